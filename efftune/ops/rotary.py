"""Rotary position embedding, x∘cos + rotate_half(x)∘sin, and its transpose."""

from __future__ import annotations

import torch
from torch import Tensor

from efftune.ops._available import (
    ROWS,
    adjacent,
    dtype_name,
    extension,
    kernels,
)
from efftune.ops._op import Op

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def composition(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """The formula in torch operations, with their own gradients. cos and sin broadcast against x (..., D)."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    c1, c2, s1, s2 = cos[..., :half], cos[..., half:], sin[..., :half], sin[..., half:]
    if transposed:
        s1, s2 = -s2, -s1
    return torch.cat([x1 * c1 - x2 * s1, x2 * c2 + x1 * s2], -1)


def _check(x: Tensor, also: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    if x.ndim != 4 or x.dtype not in _FLOATS:
        raise ValueError(f"rotary takes x (B, H, T, D), float64 | 32 | 16 or bfloat16, not {x.dtype} {tuple(x.shape)}.")
    b, _, t, d = x.shape
    if also is not None and (also.ndim != 4 or also.dtype != x.dtype or (also.shape[0], *also.shape[2:]) != (b, t, d)):
        raise ValueError(
            f"rotary takes two tensors that differ in the number of heads only, not {x.dtype} {tuple(x.shape)} and "
            f"{also.dtype} {tuple(also.shape)}."
        )
    if d % 2:
        raise ValueError(f"rotary turns pairs of columns i and D/2 + i; it takes an even D, not {d}.")
    if cos.shape != sin.shape or cos.shape not in ((b, t, d), (1, t, d)):
        raise ValueError(
            f"rotary needs cos and sin ({b}, {t}, {d}) or (1, {t}, {d}) for x {tuple(x.shape)}, not {tuple(cos.shape)} "
            f"and {tuple(sin.shape)}; where only a part of the columns turns, pass that part of x."
        )
    if cos.dtype != sin.dtype or cos.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"rotary takes cos and sin both in x's {x.dtype} or both in float32, not {cos.dtype} and {sin.dtype}."
        )


def _both(x: Tensor, also: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if also is None else (x, also)


def _fake(x, also, cos, sin, transposed):
    _check(x, also, cos, sin)
    return [torch.empty_like(t) for t in _both(x, also)]


def _reference(x, also, cos, sin, transposed):
    outs, wide = _fake(x, also, cos, sin, transposed), torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    for t, out in zip(_both(x, also), outs, strict=True):
        out.copy_(composition(t.to(wide), cos, sin, transposed))
    return outs


# A model turns q and k at the same place: one call reads cos and sin once, and costs the host half as much as two.
rotary_op = Op("rotary(Tensor x, Tensor? also, Tensor cos, Tensor sin, bool transposed) -> Tensor[]", _reference, _fake)


def _steps(table: Tensor) -> tuple[int, int]:
    """From sample to sample, which may share one table, and from token to token."""
    sample, token, _ = table.stride()
    return (sample if table.shape[0] > 1 else 0), token


def _of_cpp(x: Tensor, out: Tensor) -> tuple:
    return x.data_ptr(), out.data_ptr(), x.shape[1], x.stride()[:3], out.stride()[:3]


@rotary_op.backend("cpp", "cpu", layout=ROWS)
def _cpp(x, also, cos, sin, transposed):
    outs = _fake(x, also, cos, sin, transposed)
    b, _, t, d = x.shape
    extension("_cpu").rotary(
        _of_cpp(x, outs[0]),
        None if also is None else _of_cpp(also, outs[1]),
        cos.data_ptr(),
        sin.data_ptr(),
        b,
        t,
        d,
        _steps(cos),
        _steps(sin),
        dtype_name(x.dtype),
        dtype_name(cos.dtype),
        transposed,
        torch.get_num_threads(),
    )
    return outs


@rotary_op.backend("triton", "cuda", layout=ROWS)
def _triton(x, also, cos, sin, transposed):
    outs = _fake(x, also, cos, sin, transposed)
    kernels("rotary").rotary(_both(x, also), outs, cos, sin, (*_steps(cos), *_steps(sin)), transposed)
    return outs


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """y1 = x1∘cos1 - x2∘sin1, y2 = x2∘cos2 + x1∘sin2, where 1 and 2 are the halves of the columns: x∘cos +
    rotate_half(x)∘sin with rotate_half(x) = (-x2, x1).

    Args:
        x: (B, H, T, D) f64 | f32 | bf16 | f16, D even. Rows of D adjacent elements may lie anywhere, as in (B, T, H, D)
            seen as (B, H, T, D) or in a part of the columns; that costs no copy.
        cos, sin: (B, T, D) or (1, T, D) for all samples, both in x's dtype or both in f32. Their halves need not agree.
        transposed: the gradient instead, dx1 = dy1∘cos1 + dy2∘sin2, dx2 = dy2∘cos2 - dy1∘sin1, with dy as x. Where the
            halves agree and cos² + sin² = 1, it turns back.
    Returns: (B, H, T, D), dtype of x, with its dimensions in the same order in memory (that of `torch.empty_like`). No
        gradient.
    Numerics: all arithmetic in f32 (f64 for an f64 x), rounded once. With f32 on a CPU the bits are transformers' own.
    Saved for backward: nothing here; the caller keeps cos and sin.
    Raises: ValueError for an x that is not (B, H, T, D), floating-point and of an even D, and for cos and sin of other
        shapes or dtypes.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; the halves as in GPT-NeoX and transformers.
    """
    return rotary_op(adjacent(x), None, adjacent(cos), adjacent(sin), transposed)[0]


def rotary_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """`rotary` of q (B, H, T, D) and k (B, G, T, D), with the same bits, in one call.

    Raises: ValueError as rotary, and for a k that differs from q in more than its number of heads.
    """
    first, second = rotary_op(adjacent(q), adjacent(k), adjacent(cos), adjacent(sin), transposed)
    return first, second
