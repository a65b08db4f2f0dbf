"""Group-wise symmetric int8 weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from efftune.ops._available import dtype_name, extension, kernels
from efftune.ops._divide import divide
from efftune.ops._op import Op


def _reference(codes, scales, group, dtype):
    out = _fake(codes, scales, group, dtype)
    compute = torch.float64 if torch.float64 in (dtype, scales.dtype) else torch.float32
    each = scales.to(compute).repeat_interleave(group, dim=1)[:, : codes.shape[1]]
    return out.copy_(codes.to(compute) * each)


def _fake(codes, scales, group, dtype):
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"int8_dequantize takes codes (N, K) in int8, not {codes.dtype} with {codes.ndim} dimensions.")
    if group < 1:
        raise ValueError(f"int8_dequantize takes a group of at least 1 weight, not {group}.")
    groups = (codes.shape[1] + group - 1) // group
    if scales.ndim != 2 or scales.shape[0] != codes.shape[0] or scales.shape[1] != groups:
        raise ValueError(
            f"int8_dequantize needs scales ({codes.shape[0]}, {groups}) for codes {tuple(codes.shape)} in groups "
            f"of {group}, not {tuple(scales.shape)}."
        )
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


int8_op = Op("int8_dequantize(Tensor codes, Tensor scales, int group, ScalarType dtype) -> Tensor", _reference, _fake)


@int8_op.backend("cpp", "cpu")
def _cpp(codes, scales, group, dtype):
    out = _fake(codes, scales, group, dtype)
    extension("_cpu").int8_dequantize(
        codes.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        *codes.shape,
        group,
        dtype_name(scales.dtype),
        dtype_name(dtype),
        torch.get_num_threads(),
    )
    return out


@int8_op.backend("triton", "cuda")
def _triton(codes, scales, group, dtype):
    out = _fake(codes, scales, group, dtype)
    kernels("int8").int8_dequantize(codes, scales, out, group)
    return out


def int8_dequantize(codes: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """W[n, k] = codes[n, k] · scales[n, k // group].

    Args:
        codes: (N, K) int8.   scales: (N, ⌈K/group⌉) f64 | f32 | bf16 | f16; the last group may be ragged.
        dtype: of the result, f64 | f32 | bf16 | f16.
    Returns: (N, K), contiguous. Rows a:b of W are int8_dequantize(codes[a:b], scales[a:b], ...). No gradient.
    Numerics: the product is exact to float32 (float64 if either side is) and rounded to dtype once.
    Saved for backward: nothing.
    Raises: ValueError for codes that are not 2-d int8, or scales of another shape.
    """
    return int8_op(codes, scales, group, dtype)


def int8_quantize(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """codes = round(w / scale) in -127..127, scale = absmax / 127 of each group of a row.

    Args:
        w: (N, K) floating point.   group: weights per scale along a row; the last group may be ragged.
    Returns: codes (N, K) int8; scales (N, ⌈K/group⌉), dtype of w. An all-zero group has scale 0 and codes 0.
    Numerics: in float32 (float64 for a float64 w). The scale is rounded to w.dtype before the codes are computed, so
        the codes fit the scale that is stored: |w - codes · scale| ≤ scale / 2, unless the scale is a f16 subnormal.
        Codes and scales are equal bit for bit on all devices.
    Raises: ValueError for a weight that is not 2-d, floating point and finite, or a group below 1.
    """
    if w.ndim != 2 or not w.dtype.is_floating_point:
        raise ValueError(f"int8_quantize takes a floating-point weight (N, K), not {w.dtype} with {w.ndim} dimensions.")
    if group < 1:
        raise ValueError(f"int8_quantize takes a group of at least 1 weight, not {group}.")
    w = w.detach()
    if w.is_meta:  # there each of the operations below runs in Python, and models without data have hundreds of layers
        return torch.empty(w.shape, dtype=torch.int8, device="meta"), w.new_empty(len(w), -(-w.shape[1] // group))
    refuse_infinite(w)
    return _quantized(w, group)


def refuse_infinite(w: Tensor) -> None:
    """Raises: ValueError for a weight that `int8_quantize` has no scale for, found by one pass over it."""
    # NaN and infinity are among the extremes, which one pass finds; torch.isfinite makes tensors as large as w.
    if w.numel() and not w.is_meta and not all(map(math.isfinite, torch.stack(torch.aminmax(w)).tolist())):
        raise ValueError(
            "int8_quantize takes finite weights; this one holds an infinity or NaN: check where it was loaded from."
        )


def _quantized(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    (n, k), groups = w.shape, -(-w.shape[1] // group)
    compute = torch.float64 if w.dtype == torch.float64 else torch.float32
    grouped = F.pad(w.to(compute), (0, groups * group - k)).view(n, groups, group)
    scales = divide(grouped.abs().amax(dim=2), 127).to(w.dtype)
    # A scale of 0 is an all-zero group, or one so small that it underflows: its codes are 0 either way.
    divisor = torch.where(scales == 0, torch.inf, scales.to(compute))
    codes = (grouped / divisor[..., None]).round_().clamp_(-127, 127).to(torch.int8)
    return codes.view(n, groups * group)[:, :k].contiguous(), scales
