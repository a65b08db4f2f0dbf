"""Gated activations: every backend within the budget, gradients against autograd, halves of one tensor without a copy,
the C++ exponentials to a few units in the last place."""

import math

import pytest
import torch

from efftune import use_backend
from efftune.ops._available import extension
from efftune.ops.glu import ACTIVATIONS, glu, glu_backward, glu_backward_op, glu_op
from tests.budget import assert_within_budget
from tests.ops.backends import BACKENDS, on, skip_truncation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 33), (5, 331), (2, 1100)]
RUNS = [b for b in BACKENDS if b.values[0][0] != "cuda"]


def act(x, activation):
    """The oracle: not 1 + erf or 1 + tanh, which cancel for large negative x."""
    if activation == "silu":
        return x * torch.sigmoid(x)
    if activation == "gelu":
        return x * torch.special.erfc(-x * math.sqrt(0.5)) / 2
    if activation == "gelu_tanh":
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return x.relu() if activation == "relu" else x.relu().square()


def operands(shape, dtype):
    g = torch.Generator().manual_seed(0)
    return [(s * torch.randn(shape, generator=g)).to(dtype) for s in (1.0, 3.0, 1.0)]  # dy, gate, up


def oracle(dy, gate, up, activation, dtype):
    """y, dgate, dup by autograd."""
    gate, up = gate.to(dtype).requires_grad_(), None if up is None else up.to(dtype).requires_grad_()
    y = act(gate, activation) * (1 if up is None else up)
    inputs = [gate] if up is None else [gate, up]
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(dtype))]


def everything(dy, gate, up, activation, backend):
    y = on(backend, glu, gate, up, activation)
    return [y, *(g for g in on(backend, glu_backward, dy, gate, up, activation) if g is not None)]


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(backend, activation, dtype, gated, shape):
    skip_truncation(backend, dtype)
    dy, gate, up = operands(shape, dtype)
    args = (dy, gate, up if gated else None, activation)
    before = [t.clone() for t in (dy, gate, up)]
    results = everything(*args, backend)
    exact, single = oracle(*args, torch.float64), oracle(*args, torch.float32)
    assert len(results) == len(exact) == (3 if gated else 2)
    for result, e, s in zip(results, exact, single, strict=True):
        assert result.dtype == dtype and result.is_contiguous()
        assert_within_budget(result, e, s)
    assert all(torch.equal(a, b) for a, b in zip((dy, gate, up), before, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cpp_is_right_to_a_few_ulp(activation):
    """Relative to the value itself, over the whole range; the logistic function of a rounded cubic is not that good."""
    x = torch.linspace(-12, 12, 400_001)[None]
    with use_backend("cpp"):
        y = glu(x, None, activation).double()
    exact = act(x.double(), activation)
    size = exact.abs().clamp(min=1e-30)
    if activation == "gelu_tanh":
        size = size.clamp(min=0.1)
    assert ((y - exact).abs() <= 4 * 2**-23 * size).all()


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(backend, activation):
    x = torch.tensor([[torch.nan, torch.inf, 0.0, 40.0, -40.0, 1e4, -1e4, -90.0]]).expand(2, 8).clone()
    y = on(backend, glu, x, None, activation)
    assert y[0, 0].isnan() and y[0, 2] == 0 and (y[0, 4:].minimum(torch.tensor(0.0)).abs() < 1e-15).all()
    assert torch.equal(y[0, [3, 5]], x[0, [3, 5]].square() if activation == "relu2" else x[0, [3, 5]])
    assert y[0, 1] == torch.inf or activation == "gelu" and y[0, 1].isnan()
    dgate, _ = on(backend, glu_backward, torch.ones_like(x), x, None, activation)
    tail = torch.tensor([0.0, 2e4]) if activation == "relu2" else torch.tensor([0.0, 1.0])
    assert torch.allclose(dgate[0, [6, 5]], tail)
    bits = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FC001FF, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert on(backend, glu, bits[None], None, activation).isnan().all()


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (1, 1), (3, 1)])
def test_empty_and_single(backend, shape):
    dy, gate, up = operands(shape, torch.float32)
    for result, exact in zip(
        everything(dy, gate, up, "relu2", backend), oracle(dy, gate, up, "relu2", torch.float32), strict=True
    ):
        assert torch.allclose(result, exact, rtol=1e-6)


# Not the reference: torch rounds the tail of a vector differently from its body.
@pytest.mark.parametrize("backend", [b for b in RUNS if b.values[0][0] != "reference"])
def test_strided_halves(backend):
    dy, gate, up = operands((7, 90), torch.float32)
    merged = torch.cat([gate, up], 1)
    wide = torch.cat([dy, dy], 1)[:, 90:]
    expected = everything(dy, gate, up, "silu", backend)
    for halves in (merged.chunk(2, 1), (merged[:, :90], up), (gate.t().contiguous().t(), up)):
        results = everything(wide, *halves, "silu", backend)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    expanded = on(backend, glu_backward, dy[:1, :1].expand(7, 90), gate, up, "silu")
    plain = on(backend, glu_backward, dy[:1, :1].expand(7, 90).contiguous(), gate, up, "silu")
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


def test_halves_are_not_copied():
    gate, up = torch.randn(5, 64).chunk(2, 1)
    assert glu_op.select(gate, up, "silu").name == glu_backward_op.select(gate, gate, up, "silu").name == "cpp"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_instruction_sets_agree(activation, dtype):
    dy, gate, up = operands((37, 4999), dtype)
    cpu, before, results = extension("_cpu"), torch.get_num_threads(), []
    try:
        for threads, isa in ((1, 2), (3, 2), (1, 1), (1, 0)):
            torch.set_num_threads(threads)
            cpu.limit_isa(isa)
            results.append(everything(dy, gate, up, activation, ("cpp", "cpu")))
    finally:
        torch.set_num_threads(before)
        cpu.limit_isa(2)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_float64(activation, gated):
    dy, gate, up = operands((6, 50), torch.float64)
    args = (dy, gate, up if gated else None, activation)
    for result, exact in zip(everything(*args, ("reference", "cpu")), oracle(*args, torch.float64), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_errors(backend):
    x = torch.ones(2, 4)
    with use_backend(backend):
        for call, sentence in (
            (lambda: glu(x, x, "tanh"), "takes the activations"),
            (lambda: glu(x, x[:, :2], "silu"), "halves"),
            (lambda: glu(x, x.bfloat16(), "silu"), "up like gate"),
            (lambda: glu(x[None], None, "silu"), r"gate \(M, F\)"),
            (lambda: glu(x.int(), None, "silu"), "int32"),
            (lambda: glu_backward(x[:1], x, x, "silu"), "dy like gate"),
        ):
            with pytest.raises(ValueError, match=sentence):
                call()


def test_forced_backend_refuses():
    x = torch.ones(2, 4, dtype=torch.float64)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="computed by the reference"):
        glu(x, x, "silu")
    with use_backend("cpp"), pytest.raises(RuntimeError, match="adjacent"):
        glu_op(x.float().t(), None, "silu")


def test_opcheck_and_compile():
    torch._dynamo.reset()
    merged, dy = torch.randn(5, 14), torch.randn(5, 7)
    gate, up = merged.chunk(2, 1)
    for args in ((gate, up, "silu"), (gate, None, "gelu")):
        torch.library.opcheck(glu_op.overload, args)
        torch.library.opcheck(glu_backward_op.overload, (dy, *args))

    def f(dy, merged):
        gate, up = merged.chunk(2, 1)
        return glu(gate, up, "gelu_tanh") + 1, *glu_backward(dy, gate, up, "gelu_tanh")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(dy, merged), f(dy, merged), strict=True))
