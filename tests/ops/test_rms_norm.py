"""RMSNorm and LayerNorm: every backend within the budget, the rebuild equal bit for bit, gradients against autograd,
sums over rows that do not depend on the number of threads."""

import pytest
import torch
import torch.nn.functional as F

from efftune import use_backend
from efftune.ops._available import extension
from efftune.ops.rms_norm import (
    rms_norm,
    rms_norm_apply,
    rms_norm_apply_op,
    rms_norm_backward,
    rms_norm_backward_op,
    rms_norm_op,
)
from tests.budget import assert_within_budget
from tests.ops.backends import BACKENDS, on, skip_truncation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = [b for b in BACKENDS if b.values[0][0] != "cuda"]
SHAPES = [(1, 16), (7, 331), (130, 65), (3, 4096)]
EPS = 1e-5


def operands(shape, dtype, weight_dtype=None):
    """dy, x, weight, bias."""
    g = torch.Generator().manual_seed(0)
    dy, x = torch.randn(shape, generator=g), torch.randn(shape, generator=g) * 2 + 0.7
    weight, bias = torch.rand(shape[1], generator=g) + 0.5, torch.randn(shape[1], generator=g)
    return [dy.to(dtype), x.to(dtype), weight.to(weight_dtype or dtype), bias.to(weight_dtype or dtype)]


def formula(x, weight, bias, offset, center):
    z = x - x.mean(1, keepdim=True) if center else x
    y = z * (z.square().mean(1, keepdim=True) + EPS).rsqrt()
    y = y if weight is None else y * (offset + weight)
    return y if bias is None else y + bias


def oracle(dy, x, weight, bias, offset, center, dtype):
    """y, dx, dweight, dbias by autograd."""
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    y = formula(*leaves, offset, center)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(dtype))]


def everything(dy, x, weight, bias, offset, center, backend):
    y, mean, rstd = on(backend, rms_norm, x, weight, bias, EPS, offset, center)
    again = on(backend, rms_norm_apply, x, weight, bias, mean, rstd, offset)
    assert torch.equal(again, y)
    need = (weight is not None, bias is not None)
    dx, dweight, dbias = on(backend, rms_norm_backward, dy, x, weight, mean, rstd, offset, *need)
    return [y, dx, *([dweight] if need[0] else []), *([dbias] if need[1] else [])]


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("affine", ["plain", "weight", "gemma", "bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(backend, dtype, center, affine, shape):
    skip_truncation(backend, dtype)
    if backend == ("triton", "cpu") and shape[0] == 130:
        shape = (34, 65)  # the interpreter takes its time for each row; three programs are enough
    dy, x, weight, bias = operands(shape, dtype, torch.float32 if affine == "gemma" else dtype)
    args = [dy, x, None if affine == "plain" else weight, bias if affine == "bias" else None]
    before = [None if t is None else t.clone() for t in args]
    args += [float(affine == "gemma"), center]
    results = everything(*args, backend)
    exact, single = oracle(*args, torch.float64), oracle(*args, torch.float32)
    for result, e, s, kind in zip(results, exact, single, (dtype, dtype, torch.float32, torch.float32), strict=False):
        assert result.dtype == kind and result.is_contiguous()
        assert_within_budget(result, e, s)
    assert len(results) == len(exact)
    assert all(a is None or torch.equal(a, b) for a, b in zip(args, before, strict=False))


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("center", [False, True])
def test_statistics(backend, center):
    x = operands((5, 1001), torch.float32)[1] + 1000.0  # a variance from sums of squares would be lost here
    _, mean, rstd = on(backend, rms_norm, x, None, None, EPS, 0.0, center)
    wide = x.double()
    variance = wide.var(1, correction=0) if center else wide.square().mean(1)
    assert rstd.dtype == torch.float32 and (mean is not None) == center
    torch.testing.assert_close(rstd.double(), (variance + EPS).rsqrt(), rtol=1e-5, atol=0)
    if center:
        assert mean.shape == (5,) and mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), wide.mean(1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("k", [16384, 12289])
def test_wide_rows(backend, k):
    args = [*operands((2, k), torch.float32), 0.0, True]
    for result, e, s in zip(
        everything(*args, backend), oracle(*args, torch.float64), oracle(*args, torch.float32), strict=True
    ):
        assert_within_budget(result, e, s)


@pytest.mark.parametrize("backend", RUNS[:2])
def test_many_rows(backend):
    """Partial sums of partial sums: their error must not grow with the number of rows."""
    args = [*operands((20000, 8), torch.float32), 0.0, True]
    for result, e, s in zip(
        everything(*args, backend), oracle(*args, torch.float64), oracle(*args, torch.float32), strict=True
    ):
        assert_within_budget(result, e, s)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_instruction_sets_agree(center, dtype):
    args = [*operands((333, 211), dtype), 0.0, center]
    cpu, before, results = extension("_cpu"), torch.get_num_threads(), []
    try:
        for threads, isa in ((1, 2), (3, 2), (1, 1), (1, 0)):
            torch.set_num_threads(threads)
            cpu.limit_isa(isa)
            results.append(everything(*args, ("cpp", "cpu")))
    finally:
        torch.set_num_threads(before)
        cpu.limit_isa(2)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("center", [False, True])
def test_gradcheck_in_float64(center):
    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            y, mean, rstd = rms_norm(x, weight, bias, EPS, 1.0, center)
            ctx.save_for_backward(x, weight, mean, rstd)
            return y

        @staticmethod
        def backward(ctx, dy):
            return rms_norm_backward(dy, *ctx.saved_tensors, 1.0, True, True)

    _, x, weight, bias = operands((3, 5), torch.float64)
    assert torch.autograd.gradcheck(Norm.apply, [t.requires_grad_() for t in (x, weight, bias)])


def test_like_torch():
    _, x, weight, bias = operands((9, 64), torch.float32)
    torch.testing.assert_close(rms_norm(x, weight, None, EPS)[0], F.rms_norm(x, (64,), weight, EPS))
    torch.testing.assert_close(rms_norm(x, weight, bias, EPS, 0.0, True)[0], F.layer_norm(x, (64,), weight, bias, EPS))


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("center", [False, True])
def test_nan_stays_in_its_row(backend, center):
    dy, x, weight, bias = operands((4, 50), torch.float32)
    clean = everything(dy, x, weight, bias, 0.0, center, backend)
    x[1, 7], dy[2, 3] = torch.nan, torch.nan
    y, mean, rstd = on(backend, rms_norm, x, weight, bias, EPS, 0.0, center)
    dx, _, _ = on(backend, rms_norm_backward, dy, x, weight, mean, rstd, 0.0, True, True)
    assert y[1].isnan().all() and dx[1:3].isnan().all()
    assert torch.equal(y[[0, 2, 3]], clean[0][[0, 2, 3]]) and torch.equal(dx[[0, 3]], clean[1][[0, 3]])


@pytest.mark.parametrize("backend", RUNS)
def test_empty_batch(backend):
    y, dx, dweight, dbias = everything(
        *(t[:0] if t.ndim == 2 else t for t in operands((4, 8), torch.float32)), 0.0, True, backend
    )
    assert y.shape == dx.shape == (0, 8) and (dweight == 0).all() and (dbias == 0).all()


@pytest.mark.parametrize("backend", RUNS)
def test_strides(backend):
    dy, x, weight, bias = operands((6, 40), torch.float32)
    expected = everything(
        dy[:, :20].contiguous(), x[:, 20:].contiguous(), weight[::2].contiguous(), bias[20:], 0.0, True, backend
    )
    results = everything(dy[:, :20], x[:, 20:], weight[::2], bias[20:], 0.0, True, backend)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    results = everything(dy[:1, :1].expand(6, 40), x, weight, bias, 0.0, False, backend)
    expected = everything(dy[:1, :1].expand(6, 40).contiguous(), x, weight, bias, 0.0, False, backend)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_errors(backend):
    dy, x, weight, bias = operands((3, 4), torch.float32)
    _, mean, rstd = rms_norm(x, weight, bias, center=True)
    with use_backend(backend):
        for call, sentence in (
            (lambda: rms_norm(x[None], weight), r"x \(M, K\)"),
            (lambda: rms_norm(x.int(), weight), "int32"),
            (lambda: rms_norm(x[:, :0], None), "at least one column"),
            (lambda: rms_norm(x, weight[:2]), r"weight \(4,\)"),
            (lambda: rms_norm(x, weight, bias[None]), r"bias \(4,\)"),
            (lambda: rms_norm_apply(x, weight, bias, mean, rstd[:2]), r"rstd \(3,\)"),
            (lambda: rms_norm_apply(x, weight, bias, mean[:2], rstd), r"mean \(3,\)"),
            (lambda: rms_norm_apply(x, weight, bias, mean.bfloat16(), rstd), "mean and rstd in torch.float32"),
            (lambda: rms_norm_apply(x, weight, bias, mean, rstd.bfloat16()), "rstd in torch.bfloat16"),
            (lambda: rms_norm_backward(dy[:2], x, weight, mean, rstd), "dy like x"),
        ):
            with pytest.raises(ValueError, match=sentence):
                call()
    with pytest.raises(ValueError, match="float64 only with x"):
        rms_norm(x, weight.double())


def test_forced_backend_refuses():
    with use_backend("cpp"), pytest.raises(RuntimeError, match="computed by the reference"):
        rms_norm(torch.ones(2, 4, dtype=torch.float64))
    with use_backend("triton"), pytest.raises(RuntimeError, match="16384 that one program holds"):
        rms_norm(torch.ones(2, 16385))


def test_opcheck_and_compile():
    torch._dynamo.reset()
    dy, x, weight, bias = operands((5, 7), torch.bfloat16, torch.float32)
    for center in (False, True):
        args = (x, weight, bias if center else None, EPS, 1.0, center)
        torch.library.opcheck(rms_norm_op.overload, args)
        _, mean, rstd = rms_norm(*args)
        torch.library.opcheck(rms_norm_apply_op.overload, (*args[:3], mean, rstd, 1.0))
        torch.library.opcheck(rms_norm_backward_op.overload, (dy, x, weight, mean, rstd, 1.0, True, center))

    def f(dy, x, weight):
        y, mean, rstd = rms_norm(x, weight, None, EPS)
        dx, dweight, _ = rms_norm_backward(dy, x, weight, mean, rstd)
        return y * 2, dx, dweight, rms_norm_apply(x, weight, None, mean, rstd)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(dy, x, weight), f(dy, x, weight), strict=True))
