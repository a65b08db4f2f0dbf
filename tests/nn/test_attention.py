"""Attention over the fused kernels: values, gradients, grouped queries, masks, what it keeps, what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from efftune.linear.keep.quantized import Quantized
from efftune.memory import meter
from efftune.nn import attention as module
from efftune.nn.attention import attention
from tests.budget import assert_within_budget

B, H, HKV, T, D = 2, 4, 2, 16, 8


def inputs(dtype=torch.float32, device="cpu", heads=HKV, keys=T):
    g = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, D), (B, keys, heads, D), (B, keys, heads, D))
    made = (torch.randn(shape, generator=g).to(device, dtype).transpose(1, 2) for shape in shapes)
    return tuple(t.requires_grad_() for t in made)


def padding(keys=T):
    mask = torch.ones(B, 1, T, keys, dtype=torch.bool).tril()
    mask[0, :, :, -5:] = False
    mask[..., 0] = True
    return mask


def composed(q, k, v, mask, causal, kind):
    q, k, v = (t.detach().to("cpu", kind).requires_grad_() for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.3, enable_gqa=True)
    out.backward(upstream(out))
    return out.detach(), q.grad, k.grad, v.grad


def upstream(out):
    return torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)


def close(device, dtype, heads, mask, causal):
    q, k, v = inputs(dtype, device, heads)
    out = attention(q, k, v, None if mask is None else mask.to(device), causal=causal, scale=0.3)
    assert out.transpose(1, 2).is_contiguous()
    out.backward(upstream(out.detach().cpu()).to(device))
    own = composed(q, k, v, mask, causal, dtype)  # torch's own kernels round inside, too
    for found, exact, theirs, single in zip(
        (out.detach(), q.grad, k.grad, v.grad), composed(q, k, v, mask, causal, torch.float64), own,
        composed(q, k, v, mask, causal, torch.float32), strict=True,
    ):  # fmt: skip
        if dtype == torch.float32:
            assert_within_budget(found.cpu(), exact, single)
        else:
            assert (found.cpu().double() - exact).norm() <= 1.5 * (theirs.double() - exact).norm()


@pytest.mark.parametrize(
    "mask, causal", [(None, True), (None, False), (padding(), False)], ids=["causal", "all", "mask"]
)
@pytest.mark.parametrize("heads", [H, HKV, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, heads, mask, causal):
    close("cpu", dtype, heads, mask, causal)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, mask, causal",
    [(torch.bfloat16, None, True), (torch.float16, None, False), (torch.bfloat16, padding(), False),
     (torch.float32, padding(), False)],
)  # fmt: skip
@pytest.mark.parametrize("heads", [H, HKV])
def test_values_and_gradients_on_a_gpu(dtype, mask, causal, heads):
    close("cuda", dtype, heads, mask, causal)


@pytest.mark.parametrize("masked", [False, True])
def test_the_calls_of_the_gpus_kernels_fit_their_schemas(masked):
    q, k, v = (t.detach().to("meta", torch.bfloat16) for t in inputs())
    mask = torch.empty(B, 1, T, T, device="meta", dtype=torch.bfloat16) if masked else None
    out, rest = module._forward(q, k, v, mask, not masked, 0.3, 0.1)
    found = module._backward(torch.empty_like(out), q, k, v, mask, out, rest, not masked, 0.3, 0.1)
    assert [t.shape for t in found] == [t.shape for t in (q, k, v)]


def test_other_layouts_and_lengths():
    q, k, v = inputs(keys=9)
    plain = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]  # (B, H, T, D) in memory
    mask = padding(9)
    a, b = attention(q, k, v, mask), attention(*plain, mask)
    a.sum().backward()
    b.sum().backward()
    torch.testing.assert_close(a, b)
    for t, p in zip((q, k, v), plain, strict=True):
        torch.testing.assert_close(t.grad, p.grad)


def test_what_it_keeps():
    """q, k and v as they are, the output, 4 bytes a row and head, and one mask for two layers."""
    q, k, v = inputs(torch.bfloat16)
    mask = padding()

    def two():
        return attention(q, k, v, mask).sum() + attention(q, k, v, mask).sum()

    size = 2 * B * T * D
    kept = meter.saved_for_backward(torch.nn.Identity(), two).total
    assert kept == size * (H + 2 * HKV) + 2 * (size * H + 4 * B * T * H) + 2 * B * T * T


def test_quantised_keeps():
    q, k, v = inputs()
    exact = torch.autograd.grad(attention(q, k, v, causal=True).square().sum(), (q, k, v))
    for bits, most in ((8, 0.02), (4, 0.35)):
        torch.manual_seed(0)
        out = attention(q, k, v, causal=True, keep=Quantized(bits, 8))
        assert torch.equal(out, attention(q, k, v, causal=True))
        for found, t in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), exact, strict=True):
            assert 1e-4 * t.norm() < (found - t).norm() < most * t.norm()


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(dropout=0.1), "no dropout"),
        (dict(mask=torch.zeros(B, 1, T, T, requires_grad=True)), "position bias"),
        (dict(heads=3), "takes q"),
        (dict(dtype=torch.float64), "not torch.float64"),
    ],
)
def test_refusals(change, sentence):
    q, k, v = inputs(change.pop("dtype", torch.float32), heads=change.pop("heads", HKV))
    with pytest.raises(ValueError, match=sentence):
        attention(q, k, v, change.pop("mask", None), **change)
