"""Weight gradients of sampled rows: within the budget of a product, and torch's own bits where all rows are kept."""

import pytest
import torch

from efftune import use_backend
from efftune.linear.keep.exact import Exact
from efftune.ops.rows_grad import rows_grad, rows_grad_op
from tests.budget import assert_within_budget
from tests.ops.backends import BACKENDS, on, skip_truncation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HERE = [b for b in BACKENDS if b.values[0][0] != "cuda"]
SHAPES = [(1, 1, 1, 1), (50, 7, 13, 11), (90, 33, 65, 47), (64, 40, 4, 130), (300, 70, 16, 131)]  # M, S, N, K


@pytest.fixture(autouse=True, scope="module")
def no_16_bit_sums():
    """Else cuBLAS may add the partial sums of a split product in 16 bits."""
    matmul = torch.backends.cuda.matmul
    names = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before):
        setattr(matmul, name, value)


def operands(shape, dtype, seed=0):
    m, s, n, k = shape
    r = torch.Generator().manual_seed(seed)
    g, rows = torch.randn(m, n, generator=r).to(dtype), torch.randn(s, k, generator=r).to(dtype)
    return g, torch.randint(0, m, (s,), generator=r), torch.rand(s, generator=r) * 3 + 0.5, rows


def product(args, dtype):
    g, idx, weight, rows = args
    return (g.to(dtype)[idx] * weight.to(dtype)[:, None]).t() @ rows.to(dtype)


def yardstick(args):
    """float32 products of what the contract rounds: weight·g, once, to g.dtype."""
    g, idx, weight, rows = args
    return (g.float()[idx] * weight[:, None]).to(g.dtype).float().t() @ rows.float()


def check(backend, args):
    skip_truncation(backend, args[0].dtype)
    before = [a.clone() for a in args]
    result = on(backend, rows_grad, *args)
    assert result.dtype == args[0].dtype and result.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    assert_within_budget(result, product(args, torch.float64), yardstick(args))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(backend, dtype, shape):
    check(backend, operands(shape, dtype))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 40])
def test_many_rows(backend, dtype, n):
    check(backend, operands((1500, 4096, n, 48), dtype))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_columns_and_expanded_gradients(backend, dtype):
    g, idx, weight, rows = operands((50, 20, 30, 17), dtype)
    columns = torch.full((50, 41), torch.nan, dtype=dtype)
    columns[:, 3:33] = g
    check(backend, [columns[:, 3:33], idx, weight, rows])
    expected = on(backend, rows_grad, g, idx, weight, rows)
    assert torch.equal(on(backend, rows_grad, columns[:, 3:33], idx, weight, rows), expected)
    check(backend, [g[:1].expand(50, 30), idx, weight, rows])


@pytest.mark.parametrize("backend", HERE)
def test_rows_that_were_not_drawn_are_not_read(backend):
    g, idx, weight, rows = operands((50, 20, 30, 17), torch.float32)
    expected = on(backend, rows_grad, g, idx, weight, rows)
    rest = torch.ones(50, dtype=torch.bool)
    rest[idx] = False
    g[rest] = torch.nan
    assert torch.equal(on(backend, rows_grad, g, idx, weight, rows), expected)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("m, n, k", [(77, 13, 31), (128, 96, 64), (200, 8, 128), (1024, 16, 160)])
def test_all_rows_have_the_bits_of_the_dense_product(backend, dtype, m, n, k):
    if backend[0] == "cpp" and dtype == torch.float64:
        pytest.skip("computed by the reference")
    g, _, _, x = operands((m, m, n, k), dtype)
    every, one = torch.arange(m), torch.ones(m)
    for dense in (g, torch.randn(m, n + 9).to(dtype)[:, 5 : 5 + n]):
        # Two layouts of gᵀ may differ in the last bit, which depends on the machine.
        g_t = dense.t().contiguous() if 8 * n <= k and dtype != torch.float16 else dense.t()
        assert torch.equal(on(backend, rows_grad, dense, every, one, x), g_t @ x)
        if dtype != torch.float16:
            assert torch.equal(on(backend, rows_grad, dense, every, one, x), Exact().weight_grad(dense, (x,)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_and_the_kernel_give_the_same_bits(dtype, shape):
    args = operands(shape, dtype)
    results = [on(b.values[0], rows_grad, *args) for b in BACKENDS[:2]]
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", HERE)
def test_empty(backend):
    g, idx, weight, rows = operands((50, 20, 30, 17), torch.float32)
    nothing = on(backend, rows_grad, g, idx[:0], weight[:0], rows[:0])
    assert torch.equal(nothing, torch.zeros(30, 17))
    assert on(backend, rows_grad, g[:, :0], idx, weight, rows).shape == (0, 17)
    assert on(backend, rows_grad, g, idx, weight, rows[:, :0]).shape == (30, 0)


def test_float64_and_other_layouts_go_to_the_reference():
    args = operands((50, 20, 30, 17), torch.float64)
    torch.testing.assert_close(rows_grad(*args), product(args, torch.float64))
    g, idx, weight, rows = operands((50, 20, 30, 17), torch.float32)
    strided = g.t().contiguous().t()
    assert rows_grad_op.select(strided, idx, weight, rows).name == "reference"
    assert torch.equal(rows_grad(strided, idx, weight, rows), rows_grad(g, idx, weight, rows))


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_an_index_outside_is_refused(backend, bad):
    g, idx, weight, rows = operands((50, 20, 30, 17), torch.float32)
    idx[3] = bad
    with pytest.raises(IndexError):
        on(backend, rows_grad, g, idx, weight, rows)


def test_errors_name_what_does_not_fit():
    g, idx, weight, rows = operands((50, 20, 30, 17), torch.float32)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        rows_grad(g, idx, weight, rows.double())
    with pytest.raises(ValueError, match="matrices"):
        rows_grad(g[0], idx, weight, rows)
    for other in ((idx[1:], weight), (idx.int(), weight), (idx, weight.double()), (idx, weight[1:])):
        with pytest.raises(ValueError, match=r"idx \(20,\) int64 and weight \(20,\) float32"):
            rows_grad(g, *other, rows)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="neighbours in memory"):
        rows_grad(g.t().contiguous().t(), idx, weight, rows)


def test_opcheck_and_compile():
    args = operands((50, 20, 30, 17), torch.float32)
    torch.library.opcheck(rows_grad_op.overload, args)
    compiled = torch.compile(lambda *a: rows_grad(*a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), rows_grad(*args) + 1)
