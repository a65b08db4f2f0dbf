"""Gradients of single entries: within the budget of a dense gradient, the same bits for any number of threads, and no
memory of the weight's size."""

import pytest
import torch

from bench.harness import peak_bytes
from efftune import use_backend
from efftune.ops.entries_grad import check_indices, entries_grad, entries_grad_op
from tests.budget import assert_within_budget
from tests.ops.backends import cases, on

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [pytest.param((name, "cpu"), id=name) for name in ("reference", "cpp", "torch", "triton")]
if torch.cuda.is_available():
    BACKENDS += [pytest.param((name, "cuda"), id=f"{name}-gpu", marks=pytest.mark.gpu) for name in ("torch", "triton")]
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 15), (50, 7, 13, 20), (33, 65, 31, 400), (513, 40, 129, 700)]  # M, N, K, S


def operands(shape, dtype, seed=0):
    m, n, k, s = shape
    r = torch.Generator().manual_seed(seed)
    g, z = (torch.randn(m, width, generator=r).to(dtype) for width in (n, k))
    return g, z, torch.randperm(n * k, generator=r)[:s].sort().values.int()


def product(args, dtype):
    g, z, indices = args
    return (g.to(dtype).t() @ z.to(dtype)).view(-1)[indices.long()]


def check(backend, args):
    before = [a.clone() for a in args]
    result = on(backend, entries_grad, *args)
    assert result.dtype == torch.promote_types(args[0].dtype, torch.float32) and result.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    oracle = product(args, torch.float64)
    # Tiles are a product of torch's, in the dtype of g.
    rounded = oracle.to(args[0].dtype).double() if backend[0] == "torch" else None
    assert_within_budget(result, oracle, product(args, torch.float32), rounded)


@pytest.mark.parametrize("backend, dtype, shape", cases(BACKENDS, DTYPES, SHAPES))
def test_within_budget(backend, dtype, shape):
    check(backend, operands(shape, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens(backend, dtype):
    check(backend, operands((5000, 24, 33, 60), dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_and_expanded_gradients(backend, dtype):
    g, z, indices = operands((150, 30, 17, 90), dtype)
    columns = torch.full((150, 41), torch.nan, dtype=dtype)
    columns[:, 3:33] = g
    check(backend, [columns[:, 3:33], z, indices])
    check(backend, [g, torch.cat([z, z], 1)[:, 9:26], indices])
    check(backend, [g[:1].expand(150, 30), z, indices])
    if backend[0] != "cpp":
        check(backend, [g.t().contiguous().t(), z, indices])


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_columns_are_not_read(backend):
    g, z, _ = operands((150, 30, 17, 1), torch.float32)
    indices = torch.tensor([3 * 17 + 5, 4 * 17 + 5, 4 * 17 + 6], dtype=torch.int32)
    expected = on(backend, entries_grad, g, z, indices)
    g[:, 5:], z[:, :5] = torch.nan, torch.nan
    assert torch.equal(on(backend, entries_grad, g, z, indices), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_empty(backend, dtype):
    if dtype == torch.float64 and backend[0] in ("cpp", "triton"):
        pytest.skip("computed by torch")
    g, z, indices = operands((50, 7, 13, 20), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(on(backend, entries_grad, g, z, indices[:0]), torch.zeros(0, dtype=wide))
    assert torch.equal(on(backend, entries_grad, g[:0], z[:0], indices), torch.zeros(20, dtype=wide))
    assert on(backend, entries_grad, g[:, :0], z, indices[:0]).shape == (0,)
    assert on(backend, entries_grad, g, z[:, :0], indices[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    args, before, results = operands((1100, 300, 270, 3000), dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(on(("cpp", "cpu"), entries_grad, *args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_an_entry_does_not_depend_on_the_others():
    g, z, indices = operands((700, 40, 50, 900), torch.bfloat16)
    every = on(("cpp", "cpu"), entries_grad, g, z, indices)
    assert torch.equal(on(("cpp", "cpu"), entries_grad, g, z, indices[1::3]), every[1::3])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("n, k", [(512, 512), (300, 900)])
def test_no_memory_of_the_size_of_the_weight(backend, dtype, n, k):
    if dtype == torch.float64 and backend == "cpp":
        pytest.skip("computed by torch")
    g, z, indices = operands((1024, n, k, n * k // 100), dtype)
    with use_backend(backend):
        peak = peak_bytes(lambda: entries_grad(g, z, indices), "cpu")
    assert 4 * len(indices) < peak <= 0.55 * n * k * dtype.itemsize + 16 * len(indices)


def test_few_entries_are_dots_and_many_are_tiles():
    g, z = torch.ones(1, 2048), torch.ones(1, 2048)
    every = torch.arange(2048 * 2048, dtype=torch.int32)
    for dtype in DTYPES:
        assert entries_grad_op.select(g.to(dtype), z.to(dtype), every[::1000]).name == "cpp"
        assert entries_grad_op.select(g.to(dtype), z.to(dtype), every[::100]).name == "cpp"
    assert entries_grad_op.select(g, z, every).name == "torch"
    assert entries_grad_op.select(g.double(), z.double(), every[::1000]).name == "torch"
    assert entries_grad_op.select(g.expand(9, 2048).t().contiguous().t(), z.expand(9, 2048), every[:9]).name == "torch"
    with use_backend("cpp"):
        assert entries_grad_op.select(g, z, every).name == "cpp"


@pytest.mark.parametrize("backend", BACKENDS[:3])
@pytest.mark.parametrize("bad", [[-1, 3], [3, 7 * 13], [4, 3], [3, 3]])
def test_indices_that_are_none_are_refused(backend, bad):
    g, z, _ = operands((50, 7, 13, 1), torch.float32)
    with pytest.raises(ValueError, match="outside|sorted|rise"):
        on(backend, entries_grad, g, z, torch.tensor(bad, dtype=torch.int32))


@pytest.mark.parametrize(
    "indices, sentence",
    [
        (torch.zeros(2, 2, dtype=torch.int32), "one row of int32 or int64"),
        (torch.zeros(2), "one row of int32 or int64"),
        (torch.tensor([-1, 2]), "outside of a matrix of 3 x 4"),
        (torch.tensor([0, 12], dtype=torch.int32), "outside of a matrix of 3 x 4"),
        (torch.tensor([2, 1]), "not sorted, or one is there twice"),
        (torch.tensor([1, 1]), "not sorted, or one is there twice"),
    ],
)
def test_check_indices(indices, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_indices(indices, (3, 4))


def test_check_indices_takes_what_is_right_and_no_matrix_that_is_too_large():
    check_indices(torch.tensor([], dtype=torch.int32), (3, 4))
    check_indices(torch.tensor([0, 11]), (3, 4))
    with pytest.raises(ValueError, match="65536 x 32768 entries are too many"):
        check_indices(torch.tensor([0]), (2**16, 2**15))


def test_errors_name_what_does_not_fit():
    g, z, indices = operands((50, 7, 13, 20), torch.float32)
    for other in (z.double(), z[1:], z[0], z.int()):
        with pytest.raises(ValueError, match=r"matrices g \(M, N\) and z \(M, K\)"):
            entries_grad(g, other, indices)
    for other in (indices.long(), indices[None]):
        with pytest.raises(ValueError, match=r"indices \(S,\) int32"):
            entries_grad(g, z, other)
    with pytest.raises(ValueError, match="below 2"):
        entries_grad(g[:1, :1].expand(1, 2**16), z[:1, :1].expand(1, 2**15), indices)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="neighbours in memory"):
        entries_grad(g.t().contiguous().t(), z, indices)


def test_opcheck_and_compile():
    args = operands((50, 7, 13, 20), torch.float32)
    torch.library.opcheck(entries_grad_op.overload, args)
    compiled = torch.compile(lambda *a: entries_grad(*a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), entries_grad(*args) + 1)
