"""The added product with single entries, in both directions: within the budget, what is written rounded once."""

import pytest
import torch

from bench.harness import peak_bytes
from efftune import use_backend
from efftune.ops.entries_linear import entries_linear, entries_linear_op, entries_linear_t
from tests.budget import assert_within_budget
from tests.ops.backends import on

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [pytest.param((name, "cpu"), id=name) for name in ("reference", "cpp")]
if torch.cuda.is_available():
    BACKENDS += [pytest.param(("reference", "cuda"), id="reference-gpu", marks=pytest.mark.gpu)]
FUNCTIONS = [entries_linear, entries_linear_t]
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 15), (16, 8, 24, 40), (50, 7, 13, 20), (33, 65, 31, 400)]  # M, N, K, S


def operands(shape, dtype, function, seed=0):
    """y, x, indices, values."""
    m, n, k, s = shape
    r = torch.Generator().manual_seed(seed)
    y, x = (torch.randn(m, width, generator=r).to(dtype) for width in (n, k))
    indices = torch.randperm(n * k, generator=r)[:s].sort().values.int()
    values = torch.randn(s, generator=r).to(torch.promote_types(dtype, torch.float32))
    return (y, x, indices, values) if function is entries_linear else (x, y, indices, values)


def product(args, function, dtype):
    y, x, indices, values = args
    n, k = (y.shape[1], x.shape[1]) if function is entries_linear else (x.shape[1], y.shape[1])
    s = torch.zeros(n * k, dtype=dtype).index_put_((indices.long(),), values.to(dtype)).view(n, k)
    return y.to(dtype) + x.to(dtype) @ (s.t() if function is entries_linear else s)


def check(backend, function, args):
    before = [a.clone() for a in args]
    result = on(backend, function, args[0].clone(), *args[1:])
    assert result.dtype == args[0].dtype
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    assert_within_budget(result, product(args, function, torch.float64), product(args, function, torch.float32))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(shape, dtype, backend, function):
    check(backend, function, operands(shape, dtype, function))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_entries_in_a_row_and_in_a_column(dtype, backend, function):
    check(backend, function, operands((20, 3, 4000, 9000), dtype, function))
    check(backend, function, operands((20, 4000, 3, 9000), dtype, function))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_larger_tensors_are_written_in_place(dtype, backend, function):
    args = operands((37, 30, 17, 90), dtype, function)
    y, x, indices, values = args
    around = torch.full((37, y.shape[1] + 9), 7.0, dtype=dtype)
    around[:, 4:-5] = y
    wide = torch.full((37, x.shape[1] + 5), torch.nan, dtype=dtype)
    wide[:, 2:-3] = x
    written = around[:, 4:-5]
    with use_backend(backend[0]):
        assert function(written, wide[:, 2:-3], indices, values) is written
    assert torch.equal(written, on(backend, function, y.clone(), x, indices, values))
    assert bool((around[:, :4] == 7).all()) and bool((around[:, -5:] == 7).all())
    check(backend, function, [y, x[:1].expand_as(x), indices, values])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_zero(backend, function):
    y, x, indices, values = operands((37, 30, 17, 90), torch.float32, function)
    assert torch.equal(on(backend, function, y.clone(), x, indices[:0], values[:0]), y)
    assert torch.equal(on(backend, function, y.clone(), x, indices, torch.zeros_like(values)), y)
    assert on(backend, function, y[:0], x[:0], indices, values).shape == y[:0].shape
    assert torch.equal(on(backend, function, y.clone(), x[:, :0], indices[:0], values[:0]), y)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64_goes_to_the_reference(function):
    args = operands((37, 30, 17, 90), torch.float64, function)
    expected = product(args, function, torch.float64)
    torch.testing.assert_close(function(args[0].clone(), *args[1:]), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype, function):
    (y, *rest), before, results = operands((200, 70, 90, 900), dtype, function), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(on(("cpp", "cpu"), function, y.clone(), *rest))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_memory_of_the_size_of_the_weight(function):
    y, x, indices, values = operands((64, 512, 512, 2600), torch.float32, function)
    with use_backend("cpp"):
        peak = peak_bytes(lambda: function(y, x, indices, values), "cpu")
    assert 0 < peak < 512 * 512 * 4 / 2


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("bad", [[-1, 3], [3, 7 * 13], [4, 3], [3, 3]])
def test_indices_that_are_none_are_refused_and_nothing_is_written(bad, backend, function):
    y, x, _, values = operands((50, 7, 13, 2), torch.float32, function)
    before = y.clone()
    with pytest.raises(ValueError, match="outside|sorted|rise"):
        on(backend, function, y, x, torch.tensor(bad, dtype=torch.int32), values)
    assert torch.equal(y, before)


def test_errors_name_what_does_not_fit():
    y, x, indices, values = operands((50, 7, 13, 20), torch.float32, entries_linear)
    for other in (x.double(), x[1:], x[0], x.int()):
        with pytest.raises(ValueError, match="as many rows and one floating-point dtype"):
            entries_linear(y, other, indices, values)
    for other in ((indices.long(), values), (indices[None], values), (indices, values[1:]), (indices, values.double())):
        with pytest.raises(ValueError, match=r"indices \(S,\) int32 and values \(S,\) float32"):
            entries_linear(y, x, *other)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="neighbours in memory"):
        entries_linear(y.t().contiguous().t(), x, indices, values)


def test_autograd_sees_that_it_was_written():
    y, x, indices, values = operands((50, 7, 13, 20), torch.float32, entries_linear)
    w = torch.ones_like(y, requires_grad=True)
    total = (w * y).sum()
    with torch.no_grad():
        entries_linear(y, x, indices, values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_opcheck_and_compile():
    y, *rest = operands((50, 7, 13, 20), torch.float32, entries_linear)
    torch.library.opcheck(entries_linear_op.overload, (y.clone(), *rest, False))
    compiled = torch.compile(lambda y, *a: entries_linear(y + 1, *a) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y, *rest), entries_linear(y + 1, *rest) * 2)
