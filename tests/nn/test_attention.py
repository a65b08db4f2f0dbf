"""Attention over the fused kernels: values, gradients, grouped queries, masks, packed documents, what it keeps, what it
refuses."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from efftune.linear.keep.quantized import Quantized
from efftune.memory import meter
from efftune.nn import attention as module
from efftune.nn.attention import attention
from tests.budget import assert_within_budget, rms

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


def packing(*rows):
    """The mask of rows packed with causal documents of these lengths."""
    return torch.stack([torch.block_diag(*(torch.ones(n, n).tril() for n in row)) for row in rows])[:, None].bool()


def composed(q, k, v, mask, causal, kind, device="cpu"):
    """torch's own attention; on a GPU by the kernel that ours calls, where one for masks takes no groups of heads."""
    q, k, v = leaves = [t.detach().to(device, kind).requires_grad_() for t in (q, k, v)]
    chosen = nullcontext()
    if device != "cpu":
        chosen = sdpa_kernel(SDPBackend.FLASH_ATTENTION if mask is None else SDPBackend.EFFICIENT_ATTENTION)
    if device != "cpu" and mask is not None:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        mask = mask.to(device)
    with chosen:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=0.3, enable_gqa=q.shape[1] != k.shape[1]
        )
        out.backward(upstream(out))
    return out.detach(), *(t.grad for t in leaves)


def upstream(out):
    return torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)


def close(device, dtype, heads, mask, causal, keys=T):
    q, k, v = inputs(dtype, device, heads, keys)
    out = attention(q, k, v, None if mask is None else mask.to(device), causal=causal, scale=0.3)
    assert out.transpose(1, 2).is_contiguous()
    out.backward(upstream(out.detach()))
    exact = composed(q, k, v, mask, causal, torch.float64)
    own = composed(q, k, v, mask, causal, dtype, device)  # torch's own kernels round inside, too
    for found, oracle, theirs in zip((out.detach(), q.grad, k.grad, v.grad), exact, own, strict=True):
        if dtype == torch.float32:
            assert_within_budget(found.cpu(), oracle, theirs.cpu())
        else:
            assert rms(found.cpu() - oracle) <= 1.5 * rms(theirs.cpu() - oracle)


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
     (torch.float32, padding(), False), (torch.bfloat16, packing((T,), (5, 1, T - 6)), False),
     (torch.float32, packing((T,), (5, 1, T - 6)), False)],
)  # fmt: skip
@pytest.mark.parametrize("heads", [H, HKV])
def test_values_and_gradients_on_a_gpu(dtype, mask, causal, heads):
    close("cuda", dtype, heads, mask, causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masks_of_any_width_on_a_gpu(dtype):
    close("cuda", dtype, HKV, padding(13), False, keys=13)


@pytest.mark.parametrize("mask", ["causal", "bias", "documents"])
def test_the_calls_of_the_gpus_kernels_fit_their_schemas(mask):
    q, k, v = (t.detach().to("meta", torch.bfloat16) for t in inputs())
    given = {
        "causal": None,
        "bias": torch.empty(B, 1, T, T, device="meta", dtype=torch.bfloat16),
        "documents": torch.empty(4, device="meta", dtype=torch.int32),
    }[mask]
    settings = given is None, 0.3, 0.1, 9 if mask == "documents" else 0
    out, rest = module._forward(q, k, v, given, *settings)
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    found = module._backward(torch.empty_like(out), q, k, v, given, out, rest, *settings)
    assert [t.shape for t in found] == [t.shape for t in (q, k, v)]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16])
def test_masks_are_padded_for_the_gpus_kernel(kind):
    mask = padding(13) if kind == torch.bool else torch.randn(B, 1, T, 13, dtype=kind)
    made = module.additive(mask, torch.bfloat16, 8)
    assert torch.equal(made, module.additive(mask, torch.bfloat16)) and made.dtype == torch.bfloat16
    assert made.stride()[-2:] == (16, 1) and made.stride(0) % 8 == 0
    assert module.additive(mask, torch.bfloat16, 8) is made  # one for all layers
    mask.zero_()
    assert not torch.equal(module.additive(mask, torch.bfloat16, 8), made)  # until the mask is changed
    whole = torch.randn(B, 1, T, T)
    assert module.additive(whole, torch.float32, 8) is whole


def test_a_gpu_takes_masks_of_any_width(monkeypatch):
    """The way there, without values; torch without CUDA copies nothing to such tensors, so the mask is made here."""
    asked = []

    def made(mask, dtype, apart):
        asked.append((dtype, apart))
        return torch.empty_strided(mask.shape, (16 * T, 16 * T, 16, 1), device="cuda", dtype=dtype)

    monkeypatch.setattr(module, "additive", made)
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(t.shape, device="cuda", dtype=torch.bfloat16) for t in inputs(keys=13))
        assert attention(q, k, v, torch.empty(B, 1, T, 13, device="cuda", dtype=torch.bool)).shape == q.shape
        with pytest.raises(ValueError, match="a column for each key"):
            attention(q, k, v, torch.empty(B, 1, T, 1, device="cuda", dtype=torch.bool))
    assert asked == [(torch.bfloat16, 8)]


def test_documents_are_those_of_the_mask():
    """All masks of three tokens: four of them are packed documents."""
    found = {}
    for bits in itertools.product([False, True], repeat=9):
        packed = module.documents(torch.tensor(bits).view(1, 1, 3, 3))
        if packed is not None:
            found[bits] = packed
    expected = {(3,): [0, 3], (1, 2): [0, 1, 3], (2, 1): [0, 2, 3], (1, 1, 1): [0, 1, 2, 3]}
    assert len(found) == len(expected)
    for row, starts in expected.items():
        where, longest = found[tuple(packing(row).flatten().tolist())]
        assert where.tolist() == starts and where.dtype == torch.int32 and longest == max(row)
    mask = packing((2, 4), (6,), (1, 2, 3))
    assert module.documents(mask)[0].tolist() == [0, 2, 6, 12, 13, 15, 18] and module.documents(mask)[1] == 6
    assert module.documents(mask)[0] is module.documents(mask)[0]  # one for all layers
    assert module.documents(packing((2, 4), (6,)) & torch.ones(6, 6).triu(-2).bool()) is None  # a sliding window
    assert module.documents(padding(T)) is None
    mask[0, 0, 3, 0] = True
    assert module.documents(mask) is None


def test_transformers_masks_of_packed_rows_are_documents(monkeypatch):
    transformers = pytest.importorskip("transformers")
    import efftune
    from efftune.interop.transformers import attention as routed
    from efftune.train.batches import collate_packed
    from efftune.train.data import Example

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    efftune.apply(model, "full")
    masks, call = [], module.attend
    monkeypatch.setattr(routed, "attend", lambda *a, **kw: (masks.append(a[3]), call(*a, **kw))[1])
    examples = [Example(n, [1] * n, [1] * n) for n in (3, 2, 4, 6)]
    batch = collate_packed(0)([examples[:2], examples[2:]])
    model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    assert masks[0] is masks[1]
    starts, longest = module.documents(masks[0])
    assert starts.tolist() == [0, 3, 10, 14, 20] and longest == 7  # the padding is the last document's tail


def flash(starts, q, k, v, scale):
    """What the kernel for documents computes, (tokens, H, D), one document after the other."""
    parts = [
        F.scaled_dot_product_attention(*(t[a:b].transpose(0, 1) for t in (q, k, v)), is_causal=True, scale=scale,
                                       enable_gqa=True).transpose(0, 1)
        for a, b in itertools.pairwise(starts.tolist())
    ]  # fmt: skip
    return torch.cat(parts)


@pytest.mark.parametrize("heads", [H, HKV])
@pytest.mark.parametrize("keep", [None, Quantized(8, 8)])
def test_packed_rows_are_attended_document_by_document(heads, keep, monkeypatch):
    """With torch's sdpa in the place of the GPU's kernel."""

    def forward(q, k, v, starts, same, longest, also, dropout, causal, debug, scale):
        assert starts is same and causal and longest == also == 10
        return flash(starts, q, k, v, scale), torch.zeros(1), torch.zeros(2), torch.zeros(0), None

    def backward(dout, q, k, v, out, lse, starts, *rest, scale):
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        with torch.enable_grad():
            return torch.autograd.grad(flash(starts, q, k, v, scale), (q, k, v), dout)

    kernels = SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    mask = packing((10, 6), (5, 1, 10))
    q, k, v = inputs(heads=heads)
    expected = composed(q, k, v, mask, False, torch.float32)
    monkeypatch.setattr(module, "aten", kernels)
    monkeypatch.setattr(module, "_maybe_packed", lambda *args: True)
    out = attention(q, k, v, mask, scale=0.3, keep=keep)
    out.backward(upstream(out.detach()))
    torch.testing.assert_close(out.detach(), expected[0])
    for t, exact in zip((q, k, v), expected[1:], strict=True):
        if keep is None:
            torch.testing.assert_close(t.grad, exact)
        else:
            assert 1e-4 * exact.norm() < (t.grad - exact).norm() < 0.02 * exact.norm()


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
