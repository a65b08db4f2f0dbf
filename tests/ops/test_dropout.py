"""Dropout from a seed: the mask of the generator, exact scaling, its own backward, the same draw when recomputed."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from efftune import EfftuneError, Linear
from efftune.linear import Exact
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled
from efftune.ops import philox
from efftune.ops.draw_seed import draw_seed, draw_seed_op
from efftune.ops.dropout import dropout, dropout_op
from tests.ops.backends import BACKENDS, on, skip_truncation

SEED = torch.tensor(2**61 + 12345)


def values(n, dtype):
    return torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("backend", [b for b in BACKENDS[1:] if b.values[0][0] != "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1 - 2**-32])
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 331), (2053,)])
def test_backends_equal(backend, dtype, p, shape):
    skip_truncation(backend, dtype, exact=p in (0.0, 0.5))
    x = values(shape, dtype)
    assert torch.equal(on(backend, dropout, x, p, SEED, 3), on(("reference", "cpu"), dropout, x, p, SEED, 3))


def test_mask_and_scale():
    x, p = torch.ones(20000, dtype=torch.float64), 0.3
    y = dropout(x, p, SEED, 8)
    keep = philox.dropout_word(int(SEED), 8, 0, x.numel()) >= int(p * 2**32)
    assert torch.equal(y, keep.double() / (1 - p))
    assert abs(y.mean().item() - 1) < 5 * (p / (1 - p) / x.numel()) ** 0.5
    assert torch.equal(dropout(x.float(), p, SEED, 8) != 0, keep)
    assert not torch.equal(dropout(x, p, SEED, 9) != 0, keep)
    assert not torch.equal(dropout(x, p, SEED + 1, 8) != 0, keep)


def test_zero_probability_copies():
    x = torch.tensor([1.0, -0.0, torch.inf, torch.nan, 1e-42])
    y = dropout(x, 0.0, SEED, 1)
    assert torch.equal(y.view(torch.int32), x.view(torch.int32)) and y.data_ptr() != x.data_ptr()


def test_dropped_infinities_are_zero():
    y = dropout(torch.full((1000,), torch.inf), 0.5, SEED, 1)
    assert set(y.tolist()) == {0.0, torch.inf}


def test_non_contiguous():
    x = values((64, 48), torch.float32)
    assert torch.equal(dropout(x.t(), 0.4, SEED, 1), dropout(x.t().contiguous(), 0.4, SEED, 1))


@pytest.mark.parametrize(
    "x, p, seed, sentence",
    [
        (torch.ones(3), 1.0, SEED, r"p in \[0, 1\)"),
        (torch.ones(3), -0.1, SEED, r"p in \[0, 1\)"),
        (torch.ones(3, dtype=torch.int64), 0.5, SEED, "float32"),
        (torch.ones(3), 0.5, SEED[None], "draw_seed"),
        (torch.ones(3), 0.5, SEED.float(), "draw_seed"),
    ],
)
def test_errors_name_the_remedy(x, p, seed, sentence):
    with pytest.raises(ValueError, match=sentence):
        dropout(x, p, seed, 0)


def test_draw_seed_follows_the_generator():
    torch.manual_seed(0)
    first = [draw_seed() for _ in range(50)]
    torch.manual_seed(0)
    assert [int(s) for s in first] == [int(draw_seed()) for _ in range(50)]
    assert len({int(s) for s in first}) == 50
    assert all(s.shape == () and s.dtype == torch.int64 and 0 <= s < 2**62 for s in first)


@pytest.mark.parametrize("keep", [Quantized(group=4), Sampled(0.5, min_rows=1)], ids=str)
def test_a_graph_that_would_repeat_its_draws_is_not_captured(monkeypatch, keep):
    layer = Linear.from_linear(torch.nn.Linear(8, 8), keep=keep)
    x = torch.randn(4, 8)
    layer(x)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(EfftuneError, match="one draw in every replay.*; capture a recipe that draws nothing, or run"):
        layer(x)
    Linear.from_linear(layer, keep=Exact())(x)  # draws nothing


class SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed):
        ctx.save_for_backward(seed)
        return dropout(x, 0.5, seed, 1)

    @staticmethod
    def backward(ctx, dy):
        return dropout(dy, 0.5, ctx.saved_tensors[0], 1), None


@pytest.mark.parametrize("wrap", ["eager", "checkpoint", "compile", "compile-checkpoint"])
def test_backward_repeats_the_mask(wrap):
    """Traced random draws are repeated in backward; a registered one is carried, and replayed under checkpointing."""
    torch._dynamo.reset()

    def f(x):
        return SeededDropout.apply(x.sin(), draw_seed())

    g = (lambda x: checkpoint(f, x, use_reentrant=False)) if "checkpoint" in wrap else f
    g = torch.compile(g, fullgraph=True, backend="aot_eager") if "compile" in wrap else g
    for seed in range(10):
        x = values(500, torch.float32).requires_grad_()
        torch.manual_seed(seed)
        y = g(x)
        y.sum().backward()
        assert torch.allclose(x.grad, 2 * (y != 0) * x.detach().cos())
        torch.manual_seed(seed)
        assert torch.allclose(f(x), y)


def test_opcheck():
    torch.library.opcheck(dropout_op.overload, (torch.randn(5, 7), 0.3, torch.tensor(4), 1))
    torch.library.opcheck(dropout_op.overload, (torch.randn(7, 5).t(), 0.3, torch.tensor(4), 1))
    torch.library.opcheck(draw_seed_op.overload, (torch.empty(0),))
