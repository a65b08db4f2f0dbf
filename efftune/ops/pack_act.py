"""Group-wise affine quantisation of saved activations, 8 or 4 bits, rounded stochastically."""

from __future__ import annotations

import torch
from torch import Tensor

from efftune.ops import philox
from efftune.ops._available import ANY, dtype_name, extension, kernels
from efftune.ops._divide import divide
from efftune.ops._op import Op

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FRACTION = 2**17  # codes are computed in units of 2^-17: a 16-bit draw and the half that centres it
_SMALLEST = 2.0**-100  # least scale of a group that is not constant: 2^17 / scale stays finite


def _row_stride(x: Tensor) -> int | None:
    """Elements from one row (last dimension) to the next if one number says it and rows are dense, else None."""
    if x.ndim > 0 and x.is_contiguous():
        return x.shape[-1]
    if x.ndim == 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return None
    stride, expected = x.shape[-1], None
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if expected is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return stride


def _to_bfloat16(t: Tensor, up: bool) -> Tensor:
    """Rounded up or down to a bfloat16 value, as float32."""
    t32 = t.float()
    if t.dtype == torch.float64:
        wrong, towards = (t32.double() < t, torch.inf) if up else (t32.double() > t, -torch.inf)
        t32 = torch.where(wrong, torch.nextafter(t32, torch.full_like(t32, towards)), t32)
    bits = t32.view(torch.int32)
    away = (bits < 0) != up  # from zero
    return torch.where(away, bits + 0xFFFF, bits).bitwise_and_(-65536).view(torch.float32)


def _reference(x, bits, group, seed, stream):
    codes, stats = _fake(x, bits, group, seed, stream)
    if x.numel() == 0:
        return codes, stats
    levels, cols, groups = 2**bits - 1, x.shape[-1], stats.shape[-2]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    padding = torch.arange(groups * group, device=x.device).clamp(max=cols - 1)  # the last column, again
    grouped = x.to(compute)[..., padding].unflatten(-1, (groups, group))
    low = _to_bfloat16(grouped.amin(-1) + 0.0, up=False)
    extent = grouped.amax(-1) - low
    finite = extent.abs() < torch.inf
    scale = _to_bfloat16(divide(extent, levels), up=True).clamp(min=_SMALLEST)
    scale = torch.where(extent == 0, 0.0, scale)
    stats.copy_(torch.stack([low, scale], -1)).masked_fill_(~finite[..., None], torch.nan)
    inverse = torch.where(extent == 0, 0.0, _FRACTION / scale.to(compute))
    position = ((grouped - low[..., None]) * inverse[..., None]).clamp(0, levels * _FRACTION)
    position = position.masked_fill_(~finite[..., None], 0).flatten(-2)[..., :cols].to(torch.int64)
    draw = 2**15
    if seed is not None:
        draw = philox.rounding_bits(int(seed), stream, 0, x.numel(), x.device).view(x.shape)
    whole = ((position + 2 * draw + 1) // _FRACTION).to(torch.uint8)
    if bits == 4:
        whole = torch.nn.functional.pad(whole, (0, cols % 2)).unflatten(-1, (-1, 2))
        whole = whole[..., 0] | whole[..., 1] << 4
    return codes.copy_(whole), stats


def _check_layout(name, bits, group):
    if bits not in (4, 8):
        raise ValueError(f"{name} takes 4 or 8 bits, not {bits}.")
    if group < 1 or (bits == 4 and group % 2):
        raise ValueError(f"{name} takes a group of at least 1, and an even one for 4 bits, not {group}.")


def _fake(x, bits, group, seed, stream):
    if x.dtype not in _FLOATS or x.ndim == 0:
        raise ValueError(
            f"pack_act takes x (..., K) in float64, float32, bfloat16 or float16, not {x.dtype} with {x.ndim} "
            "dimensions."
        )
    _check_layout("pack_act", bits, group)
    if seed is not None and (not seed.is_cpu or seed.dtype != torch.int64 or seed.ndim != 0):
        raise ValueError("pack_act takes its seed as a 0-d int64 tensor on the CPU; make it with draw_seed().")
    if not 0 <= stream < 2**32:
        raise ValueError(f"pack_act takes a stream in [0, 2^32), not {stream}; hash the parameter's name to 32 bits.")
    *lead, cols = x.shape
    codes = x.new_empty(*lead, (cols * bits + 7) // 8, dtype=torch.uint8)
    return codes, x.new_empty(*lead, (cols + group - 1) // group, 2, dtype=torch.bfloat16)


pack_op = Op(
    "pack_act(Tensor x, int bits, int group, Tensor? seed, SymInt stream) -> (Tensor, Tensor)", _reference, _fake
)


def _unpack_reference(codes, stats, bits, group, cols, dtype):
    out = _unpack_fake(codes, stats, bits, group, cols, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :cols]
    low, scale = (stats.to(compute).repeat_interleave(group, -2)[..., :cols, i] for i in range(2))
    return out.copy_(low + scale * codes)


def _unpack_fake(codes, stats, bits, group, cols, dtype):
    _check_layout("unpack_act", bits, group)
    if codes.dtype != torch.uint8 or stats.dtype != torch.bfloat16 or dtype not in _FLOATS:
        raise ValueError(
            f"unpack_act makes float64, float32, bfloat16 or float16 from codes in uint8 and stats in bfloat16, not "
            f"{dtype} from {codes.dtype} and {stats.dtype}."
        )
    lead = codes.shape[:-1]
    width, groups = (cols * bits + 7) // 8, (cols + group - 1) // group
    if codes.ndim == 0 or codes.shape[-1] != width or stats.shape != (*lead, groups, 2):
        raise ValueError(
            f"unpack_act needs codes (..., {width}) and stats (..., {groups}, 2) for {cols} columns of {bits} bits in "
            f"groups of {group}, not {tuple(codes.shape)} and {tuple(stats.shape)}."
        )
    return codes.new_empty(*lead, cols, dtype=dtype)


unpack_op = Op(
    "unpack_act(Tensor codes, Tensor stats, int bits, int group, SymInt cols, ScalarType dtype) -> Tensor",
    _unpack_reference,
    _unpack_fake,
)


def _rows_why_not(x: Tensor, *_) -> str | None:
    return None if _row_stride(x) is not None else "the kernels take dense rows at one stride"


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()


@pack_op.backend("cpp", "cpu", layout=ANY, why_not=_rows_why_not)
def _pack_cpp(x, bits, group, seed, stream):
    codes, stats = _fake(x, bits, group, seed, stream)
    extension("_cpu").pack_act(
        x.data_ptr(),
        codes.data_ptr(),
        stats.data_ptr(),
        _rows(x),
        x.shape[-1],
        _row_stride(x),
        group,
        bits,
        dtype_name(x.dtype),
        seed is not None,
        0 if seed is None else int(seed) % 2**64,
        stream,
        torch.get_num_threads(),
    )
    return codes, stats


@unpack_op.backend("cpp", "cpu")
def _unpack_cpp(codes, stats, bits, group, cols, dtype):
    out = _unpack_fake(codes, stats, bits, group, cols, dtype)
    extension("_cpu").unpack_act(
        codes.data_ptr(),
        stats.data_ptr(),
        out.data_ptr(),
        _rows(out),
        cols,
        group,
        bits,
        dtype_name(dtype),
        torch.get_num_threads(),
    )
    return out


def _tile_why_not(x, bits, group, *_):
    return _rows_why_not(x) or (f"a group of {group} does not fit one tile (8192)" if group > 8192 else None)


@pack_op.backend("triton", "cuda", layout=ANY, why_not=_tile_why_not)
def _pack_triton(x, bits, group, seed, stream):
    codes, stats = _fake(x, bits, group, seed, stream)
    kernels("pack_act").pack_act(
        x, codes, stats, _row_stride(x), bits, group, None if seed is None else int(seed), stream
    )
    return codes, stats


@unpack_op.backend("triton", "cuda")
def _unpack_triton(codes, stats, bits, group, cols, dtype):
    out = _unpack_fake(codes, stats, bits, group, cols, dtype)
    kernels("pack_act").unpack_act(codes, stats, out, bits, group)
    return out


def pack_act(x: Tensor, bits: int, group: int, seed: Tensor | None, stream: int = 0) -> tuple[Tensor, Tensor]:
    """code = ⌊(x - min) / scale + u⌋ in each group of a row, u uniform in (0, 1); `unpack_act` is min + scale · code.

    Args:
        x: (..., K), f64 | f32 | bf16 | f16. Dense rows at one common stride (one half of a merged projection) are read
            in place; other layouts are copied first.
        bits: 8 or 4.   group: elements of a row that share min and scale, even for 4 bits; the last may be ragged.
        seed: 0-d int64 on the CPU (`draw_seed()`), or None: round to nearest, u = ½.
        stream: separates uses of one seed, in [0, 2^32).
    Returns: codes (..., ⌈K · bits / 8⌉) uint8, with 4 bits element 2j in the low half of byte j and 2j + 1 in the high
        half; stats (..., ⌈K / group⌉, 2) bf16, min and scale. bits/8 + 4/group bytes for each element. No gradient.
    Numerics: min is rounded down to bf16, scale = (max - min) / (2^bits - 1) with this min is rounded up: what is
        stored spans the group, and no element is clamped but by float32 rounding. E[min + scale · code] = x, to float32
        rounding of (x - min) and to 2^-17 of a scale for u's 16 bits; |error| < scale (scale / 2 for seed=None), to
        float32 rounding. (x - min) is multiplied by 1 / scale, in float32 (float64 for f64). Codes and stats are equal
        bit for bit on all backends: u belongs to the element's index in contiguous x (Philox, purpose ROUNDING).
        A constant group has scale 0 and is exact if bf16 holds its value: always for a bf16 x. Otherwise rounding min
        widens the range by up to an ulp of bf16 at min: unbiased still, but a group of f32 or f16 that is narrow and
        far from 0 gets a coarser scale. The scale of any other group is at least 2^-100.
        A group with a NaN or an infinity, with a min below bf16's range or a range above float32's, has min and scale
        NaN and codes 0: it comes back as NaN, never as finite numbers.
    Saved for backward: nothing; codes and stats are what a caller saves instead of x.
    Raises: ValueError for an integer or 0-d x, other bits, a group below 1 or odd with 4 bits, or another kind of seed.
    Source: Pan et al. 2021, arXiv:2111.11124 (Mesa), section 3; here the statistics are those of the packed tensor.
    """
    return pack_op(x if _row_stride(x) is not None else x.contiguous(), bits, group, seed, stream)


def unpack_act(codes: Tensor, stats: Tensor, bits: int, group: int, cols: int, dtype: torch.dtype) -> Tensor:
    """x̃ = min + scale · code: what `pack_act` packed.

    Args:
        codes, stats, bits, group: of pack_act.   cols: K, of the x that was packed.
        dtype: of the result, f64 | f32 | bf16 | f16; it need not be that of x.
    Returns: (..., K), contiguous. No gradient.
    Numerics: scale · code is exact in float32, so x̃ is rounded to float32 once (f64: exact to float64), then to nearest
        in dtype. It is unbiased up to this last step, which for bf16 moves values by up to half an ulp of bf16.
    Saved for backward: nothing.
    Raises: ValueError for codes or stats of another shape or dtype.
    """
    return unpack_op(codes.contiguous(), stats.contiguous(), bits, group, cols, dtype)
