import pytest
import torch

from efftune import use_backend
from efftune.ops.lowrank_linear import OP, lowrank_linear, lowrank_linear_t
from tests.budget import assert_within_budget, rms

SHAPES = [(1, 16, 16, 1), (7, 13, 11, 3), (33, 65, 47, 16), (130, 70, 67, 70), (64, 4096, 32, 8)]  # M, K, N, R
CASES = [("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float16), ("reference", torch.bfloat16)]
CASES += [("rank_first", torch.float16), ("rank_first", torch.bfloat16)]
ALIGNED = [(8, 16, 16, 8), (40, 72, 56, 16), (264, 136, 520, 72)]  # the last: six tiles for two programs


def operands(shape, dtype, bias=True, seed=0):
    m, k, n, r = shape
    g = torch.Generator().manual_seed(seed)
    x, w, h, b = (torch.randn(s, generator=g) for s in ((m, k), (n, k), (m, r), (n, r)))
    return [t.to(dtype) for t in (x, w / k**0.5, h, b / r**0.5)] + [
        torch.randn(n, generator=g).to(dtype) if bias else None
    ]


def product(args, dtype):
    x, w, h, b, bias = (None if t is None else t.to(dtype) for t in args)
    y = x @ w.t() + h @ b.t()
    return y if bias is None else y + bias


def check(backend, args):
    with use_backend(backend):
        y = lowrank_linear(*args)
    assert y.dtype == args[0].dtype and y.is_contiguous()
    on_cpu = [None if t is None else t.cpu() for t in args]
    exact = product(on_cpu, torch.float64)
    if y.is_cuda:  # cuBLAS sums one term after the other, and tensor cores truncate: no more than it errs by itself
        theirs = product(args, y.dtype).cpu()
        assert rms(y.cpu().double() - exact) <= 1.5 * rms(theirs.double() - exact)
    else:
        assert_within_budget(y, exact, product(on_cpu, torch.float32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend, dtype", CASES)
def test_forward_is_within_budget(backend, dtype, shape):
    check(backend, operands(shape, dtype, bias=shape[0] != 7))


@pytest.mark.parametrize("backend, dtype", CASES)
def test_transposed_twin_takes_strided_operands(backend, dtype):
    m, k, n, r = 33, 65, 47, 5
    dy, dh = torch.randn(m, n).to(dtype), torch.randn(m, r).to(dtype)
    w, a = torch.randn(n, k).to(dtype), torch.randn(r, k).to(dtype)
    check(backend, [dy, w.t(), dh, a.t(), None])
    check(backend, [torch.randn(n, m).to(dtype).t(), w.t(), dh, a.t(), None])  # a column-major dy
    with use_backend(backend):
        expanded = lowrank_linear(dy[:1].expand(m, n), w.t(), dh[:1].expand(m, r), a.t())
        torch.testing.assert_close(expanded, lowrank_linear(dy, w.t(), dh, a.t())[:1].expand(m, k))


@pytest.mark.parametrize("shape", ALIGNED)
def test_the_kernel_is_within_budget(shape):
    m, k, n, r = shape
    check("triton", operands(shape, torch.float16, bias=m != 8))
    dy, dh = torch.randn(m, n).half(), torch.randn(m, r).half()
    w, a = torch.randn(n, k).half() / n**0.5, torch.randn(r, k).half()
    check("triton", [dy, w.t(), dh, a.t(), None])
    check("triton", [dy[:, :-3], w.t()[:, :-3], dh, a.t(), None])  # rows lie where they did
    check("triton", [torch.randn(m, 2 * n).half()[:, n:], w.t(), dh, a.t(), None])  # part of a merged gradient


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda x, w, h, b: (x.float(), w.float(), h.float(), b.float()), "bfloat16 and float16"),
        (lambda x, w, h, b: (x[:, :-1].contiguous(), w[:, :-1], h, b), "multiples of 8"),
        (lambda x, w, h, b: (x, w[:-1], h, b[:-1]), "multiples of 8"),
        (lambda x, w, h, b: (x.t().contiguous().t(), w, h, b), "multiples of 8"),
        (lambda x, w, h, b: (x[:1].expand_as(x), w, h, b), "multiples of 8"),
        (lambda x, w, h, b: (x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x), w, h, b), "multiples of 8"),
    ],
)
def test_the_kernel_refuses_what_the_copy_engine_does_not_take(change, reason):
    args = change(*operands((16, 32, 24, 8), torch.float16)[:4])
    with use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        lowrank_linear(*args)


def test_float64_gives_the_exact_product():
    args = operands((7, 13, 11, 3), torch.float64)
    torch.testing.assert_close(lowrank_linear(*args), product(args, torch.float64))


EACH = ["torch", "rank_first", "triton", "reference"]


@pytest.mark.parametrize("backend", EACH)
def test_empty_batch(backend):
    args = operands((8, 16, 24, 8), torch.float16)
    with use_backend(backend):
        assert lowrank_linear(args[0][:0], args[1], args[2][:0], *args[3:]).shape == (0, 24)


@pytest.mark.parametrize("backend", EACH)
def test_inputs_are_unchanged(backend):
    args = operands((8, 16, 24, 8), torch.float16)
    before = [t.clone() for t in args]
    with use_backend(backend):
        lowrank_linear(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_opcheck():
    torch.library.opcheck(OP.overload, operands((7, 13, 11, 3), torch.float32))
    torch.library.opcheck(OP.overload, operands((7, 13, 11, 3), torch.bfloat16, bias=False))


@pytest.mark.parametrize("wrong, message", [(0, "columns"), (1, "columns"), (2, "rank"), (3, "rank")])
def test_shapes_that_do_not_fit_are_refused(wrong, message):
    args = operands((7, 13, 11, 3), torch.float32)
    args[wrong] = args[wrong][:, :-1]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        OP(*args)
    with pytest.raises(RuntimeError):
        lowrank_linear(*args)


def test_forced_backend_gives_its_reason():
    args = operands((4, 300, 300, 257), torch.float32)
    with use_backend("triton"), pytest.raises(RuntimeError, match="rank 257 exceeds"):
        lowrank_linear(*args)
    with (
        use_backend("cpp"),
        pytest.raises(RuntimeError, match="no backend 'cpp'; it has rank_first, torch, triton, reference"),
    ):
        lowrank_linear(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 777, 1030, 256), (4096, 4096, 4096, 16), *ALIGNED])
def test_within_budget_on_a_gpu(shape, dtype):
    # Else cuBLAS may add the partial sums of a split K in 16 bits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    args = [None if t is None else t.cuda() for t in operands(shape, dtype)]
    allowed = [b.name for b in OP.backends if b.why_not(*args) is None]
    assert allowed[0] == OP.select(*args).name == ("torch" if dtype == torch.float32 else "rank_first")
    for backend in (*allowed, None):
        check(backend, args)
    dy, dh = args[0].new_empty(shape[0], shape[2]).normal_(), args[2]
    a = torch.randn(shape[3], shape[1], device="cuda").to(dtype)
    check(None, [dy, args[1].t(), dh, a.t(), None])
    with use_backend(allowed[0]):
        assert torch.equal(lowrank_linear_t(dy, args[1], dh, a), lowrank_linear(dy, args[1].t(), dh, a.t()))
    assert torch.equal(lowrank_linear_t(dy, args[1], dh, a), lowrank_linear(dy, args[1].t(), dh, a.t()))
