"""Σ_s weight_s · g[idx_s]ᵀ · rows_s: a weight gradient from sampled rows."""

from __future__ import annotations

import torch
from torch import Tensor

from efftune.ops._available import ROWS, dtype_name, extension, kernels
from efftune.ops._op import Op


def _fake(g, idx, weight, rows):
    if g.ndim != 2 or rows.ndim != 2 or g.dtype != rows.dtype or not g.dtype.is_floating_point:
        raise ValueError(
            f"rows_grad takes matrices g (M, N) and rows (S, K) of one floating-point dtype, not {g.dtype} with "
            f"{g.ndim} and {rows.dtype} with {rows.ndim} dimensions."
        )
    s = rows.shape[0]
    if idx.shape != (s,) or idx.dtype != torch.int64 or weight.shape != (s,) or weight.dtype != torch.float32:
        raise ValueError(
            f"rows_grad takes idx ({s},) int64 and weight ({s},) float32 for rows {tuple(rows.shape)}, "
            f"not {tuple(idx.shape)} {idx.dtype} and {tuple(weight.shape)} {weight.dtype}."
        )
    return rows.new_empty(g.shape[1], rows.shape[1])


def _laid_out(g: Tensor, rows: Tensor) -> bool:
    # As in linear/keep/exact.py: few columns are transposed in memory before the product. Not in float16, where torch's
    # product of that layout is four times slower on a CPU without float16 arithmetic.
    return 8 * g.shape[1] <= rows.shape[1] and g.dtype != torch.float16


def _reference(g, idx, weight, rows):
    _fake(g, idx, weight, rows)
    wide = torch.promote_types(g.dtype, torch.float32)
    scaled = (g.index_select(0, idx).to(wide) * weight[:, None]).to(g.dtype)
    return (scaled.t().contiguous() if _laid_out(g, rows) else scaled.t()) @ rows


rows_grad_op = Op("rows_grad(Tensor g, Tensor idx, Tensor weight, Tensor rows) -> Tensor", _reference, _fake)


@rows_grad_op.backend("cpp", "cpu", layout=ROWS, of="g idx weight")
def _cpp(g, idx, weight, rows):
    _fake(g, idx, weight, rows)
    (m, n), s, transposed = g.shape, rows.shape[0], _laid_out(g, rows)
    scaled = g.new_empty((n, s) if transposed else (s, n))
    pointers = g.data_ptr(), idx.data_ptr(), weight.data_ptr(), scaled.data_ptr()
    dtype = dtype_name(g.dtype)
    extension("_cpu").scale_rows(*pointers, m, n, g.stride(0), s, transposed, dtype, torch.get_num_threads())
    return (scaled if transposed else scaled.t()) @ rows


# One pass instead of torch's four for the copy of S·N elements. A kernel that gathered inside the product, without the
# copy, took 2.2 times as long on an H200 (1.3 in float32; docs/log.md).
@rows_grad_op.backend("triton", "cuda", layout=ROWS, of="g idx weight")
def _triton(g, idx, weight, rows):
    _fake(g, idx, weight, rows)
    return kernels("rows_grad").scale_rows(g, idx, weight).t() @ rows


rows_grad_op.backend("torch", "cuda")(_reference)


def rows_grad(g: Tensor, idx: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """dW = Σ_s weight_s · g[idx_s]ᵀ · rows_s, an estimate of gᵀx from rows = x[idx]; see `sample_rows`.

    Args:
        g: (M, N) f64 | f32 | bf16 | f16, any strides; columns of a larger gradient without a copy.
        idx: (S,) int64 in [0, M), may repeat.   weight: (S,) f32.   rows: (S, K), dtype of g.
    Returns: (N, K), dtype of g. No gradient.
    Numerics: weight·g is rounded to g.dtype once (in f16 a large weight can overflow there), the product accumulates in
        f32 (on a GPU see `lowrank_linear`). With idx = arange(M) and weight = 1 the result on the CPU has the bits of
        torch's gᵀ @ rows, for few columns those of gᵀ.contiguous() @ rows, as keep=Exact() computes it.
    Saved for backward: nothing. The scaled rows of g, S·N elements, exist during the call.
    Raises: ValueError on shapes or dtypes that do not fit, IndexError on the CPU for an index outside [0, M).
    Source: Liu et al. 2023, arXiv:2305.15265.
    """
    return rows_grad_op(g, idx, weight, rows)
