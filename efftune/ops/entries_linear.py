"""Products with a matrix S that is 0 but for some entries, added to what is there: y += x·Sᵀ and dx += dy·S."""

from __future__ import annotations

import torch
from torch import Tensor

from efftune.ops._available import ROWS, dtype_name, extension
from efftune.ops._op import Op
from efftune.ops.entries_grad import check_indices

TOKENS, SPARE = 16, 16  # as in csrc/entries_linear.cpp
CHUNK = 2**20  # products of an entry and a token that the reference holds


def _sizes(y, x, transposed) -> tuple[int, int]:
    """(N, K) of S."""
    return (x.shape[1], y.shape[1]) if transposed else (y.shape[1], x.shape[1])


def _check(y, x, indices, values, transposed):
    if y.ndim != 2 or x.ndim != 2 or y.dtype != x.dtype or not y.dtype.is_floating_point or len(y) != len(x):
        raise ValueError(
            "entries_linear takes matrices of as many rows and one floating-point dtype, not "
            f"{tuple(y.shape)} {y.dtype} and {tuple(x.shape)} {x.dtype}."
        )
    wide, s = torch.promote_types(y.dtype, torch.float32), indices.shape
    if indices.ndim != 1 or indices.dtype != torch.int32 or values.shape != s or values.dtype != wide:
        raise ValueError(
            f"entries_linear takes indices (S,) int32 and values (S,) {dtype_name(wide)}, not "
            f"{tuple(s)} {indices.dtype} and {tuple(values.shape)} {values.dtype}."
        )


def _reference(y, x, indices, values, transposed):
    _check(y, x, indices, values, transposed)
    n, k = _sizes(y, x, transposed)
    check_indices(indices, (n, k))
    sums = torch.zeros_like(y, dtype=values.dtype)
    count = max(1, CHUNK // max(len(y), 1))
    for at, value in zip(indices.split(count), values.split(count)):
        row, col = at // k, at % k
        to, of = (col, row) if transposed else (row, col)
        sums.index_add_(1, to, x[:, of].to(values.dtype) * value)
    y.copy_(y.to(values.dtype) + sums)


entries_linear_op = Op(
    "entries_linear(Tensor(a!) y, Tensor x, Tensor indices, Tensor values, bool transposed) -> ()", _reference, _check
)


@entries_linear_op.backend("cpp", "cpu", layout=ROWS)
def _cpp(y, x, indices, values, transposed):
    _check(y, x, indices, values, transposed)
    n, k = _sizes(y, x, transposed)
    indices, values = indices.contiguous(), values.contiguous()
    parts = max(1, min(torch.get_num_threads(), -(-len(y) // TOKENS)))
    blocks = values.new_empty(parts, n + k + SPARE, TOKENS)
    pointers = (t.data_ptr() for t in (y, x, indices, values, blocks))
    sizes = (len(y), n, k), (y.stride(0), x.stride(0)), len(indices)
    extension("_cpu").entries_linear(*pointers, *sizes, transposed, dtype_name(y.dtype), parts)
    # Autograd's check that a saved tensor was not changed since sees only what torch's own kernels write.
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)


def entries_linear(y: Tensor, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """y += x·Sᵀ, where S[indices_s // K, indices_s % K] = values_s, and 0 elsewhere.

    Args:
        y: (M, N) f64 | f32 | bf16 | f16, written.   x: (M, K), dtype of y, no part of y.
        indices: (S,) int32 in [0, N·K), sorted and distinct (`check_indices`).   values: (S,) f32 (of f64 f64).
    Returns: y. No gradient.
    Numerics: values are not rounded, sums are in f32 in the order of the entries, and y is rounded once.
    Saved for backward: nothing. During the call there are 16·(N + K) numbers in f32 for each thread.
    Raises: ValueError on shapes or dtypes that do not fit, and for indices outside or not sorted.
    """
    entries_linear_op(y, x, indices, values, False)
    return y


def entries_linear_t(dx: Tensor, dy: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """dx += dy·S, for dx (M, K) and dy (M, N); see `entries_linear`."""
    entries_linear_op(dx, dy, indices, values, True)
    return dx
