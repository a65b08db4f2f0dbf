"""RMSNorm and LayerNorm: one operator with a flag, its rebuild from saved statistics, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from efftune.ops._available import dtype_name, extension, kernels
from efftune.ops._op import Op, contiguous_like

_STORED = (torch.float32, torch.bfloat16, torch.float16)
_FLOATS = (*_STORED, torch.float64)
MAX_TRITON_COLUMNS = 16384  # one program holds a row


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gain(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    """offset + weight, the factor of each column; 1 without a weight."""
    if weight is None:
        return torch.ones(x.shape[1], dtype=_wide(x), device=x.device)
    wide = weight if weight.dtype == _wide(x) else weight.to(_wide(x))
    return wide + offset if offset else wide


def _normalised(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    x = x.to(_wide(x))
    return (x if mean is None else x - mean[:, None]) * rstd[:, None]


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> None:
    dtype = x.dtype
    if x.ndim != 2 or dtype not in _FLOATS:
        raise ValueError(f"rms_norm takes x (M, K), float64 | 32 | 16 or bfloat16, not {dtype} {tuple(x.shape)}.")
    columns = x.shape[1]
    if columns == 0:
        raise ValueError("rms_norm needs at least one column: a row of no elements has no mean.")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.ndim != 1 or t.numel() != columns:
            raise ValueError(f"rms_norm needs a {name} ({columns},) for x {tuple(x.shape)}, not {tuple(t.shape)}.")
        if t.dtype != dtype and t.dtype not in _STORED:
            raise ValueError(f"rms_norm takes a floating-point {name}, float64 only with x, not {t.dtype}.")


def _check_saved(x: Tensor, mean: Tensor | None, rstd: Tensor) -> None:
    m, wide = x.shape[0], _wide(x)
    for name, t in (("rstd", rstd), ("mean", mean)):
        if t is None:
            continue
        if t.ndim != 1 or t.numel() != m:
            raise ValueError(
                f"rms_norm needs {name} ({m},) for x {tuple(x.shape)}, as the forward returned it, not "
                f"{tuple(t.shape)}."
            )
        if t.dtype != wide:
            raise ValueError(f"rms_norm takes mean and rstd in {wide}, not {name} in {t.dtype}.")


def _empty(x: Tensor, size: int) -> Tensor:
    # A third of the time is the dtype, if it is given.
    return x.new_empty(size) if x.dtype == _wide(x) else x.new_empty(size, dtype=torch.float32)


def _fake(x, weight, bias, eps, offset, center):
    _check(x, weight, bias)
    m = x.shape[0]
    return [contiguous_like(x), _empty(x, m), _empty(x, m)] if center else [contiguous_like(x), _empty(x, m)]


def _reference(x, weight, bias, eps, offset, center):
    _check(x, weight, bias)
    wide = x.to(_wide(x))
    mean = wide.mean(1) if center else None
    centred = wide if mean is None else wide - mean[:, None]
    rstd = (centred.square().mean(1) + eps).rsqrt()
    y = _apply_reference(x, weight, bias, mean, rstd, offset)
    return [y, rstd] if mean is None else [y, rstd, mean]


def _apply_fake(x, weight, bias, mean, rstd, offset):
    _check(x, weight, bias)
    _check_saved(x, mean, rstd)
    return contiguous_like(x)


def _apply_reference(x, weight, bias, mean, rstd, offset):
    out = _apply_fake(x, weight, bias, mean, rstd, offset)
    y = _normalised(x, mean, rstd) * _gain(x, weight, offset)
    return out.copy_(y if bias is None else y + bias.to(y.dtype))


def _backward_fake(dy, x, weight, mean, rstd, offset, need_weight, need_bias):
    _check(x, weight)
    _check_saved(x, mean, rstd)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ValueError(
            f"rms_norm_backward takes dy like x, {x.dtype} {tuple(x.shape)}, not {dy.dtype} {tuple(dy.shape)}."
        )
    k = x.shape[1]
    return [contiguous_like(x), *[_empty(x, k) for need in (need_weight, need_bias) if need]]


def _backward_reference(dy, x, weight, mean, rstd, offset, need_weight, need_bias):
    dx = _backward_fake(dy, x, weight, mean, rstd, offset, need_weight, need_bias)[0]
    wide, x_hat = dy.to(_wide(x)), _normalised(x, mean, rstd)
    g = wide * _gain(x, weight, offset)
    inner = g - x_hat * (g * x_hat).mean(1, keepdim=True)
    if mean is not None:
        inner = inner - g.mean(1, keepdim=True)
    dx.copy_(inner * rstd[:, None])
    return [dx, *([(wide * x_hat).sum(0)] if need_weight else ()), *([wide.sum(0)] if need_bias else ())]


# The operators return what there is, as a list: an empty tensor in place of what is not wanted costs a sixth of a call.
rms_norm_op = Op(  # y, rstd and, if centred, mean
    "rms_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float offset, bool center) -> Tensor[]",
    _reference,
    _fake,
)
rms_norm_apply_op = Op(
    "rms_norm_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd, float offset) -> Tensor",
    _apply_reference,
    _apply_fake,
)
rms_norm_backward_op = Op(  # dx and, as needed, dweight and dbias
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? mean, Tensor rstd, float offset, "
    "bool need_weight, bool need_bias) -> Tensor[]",
    _backward_reference,
    _backward_fake,
)


def _wanted(outputs: list[Tensor], need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dweight, dbias of what `rms_norm_backward_op` returns."""
    return outputs[0], outputs[1] if need_weight else None, outputs[-1] if need_bias else None


def _pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _run_cpp(x, y, weight, bias, mean, rstd, offset, eps, saved):
    gain, bias = _gain(x, weight, offset), None if bias is None else bias.float()
    pointers = _pointers(x, y, gain, bias, mean, rstd)
    extension("_cpu").norm(*pointers, *x.shape, eps, dtype_name(x.dtype), saved, torch.get_num_threads())


@rms_norm_op.backend("cpp", "cpu")
def _cpp(x, weight, bias, eps, offset, center):
    outputs = _fake(x, weight, bias, eps, offset, center)
    _run_cpp(x, outputs[0], weight, bias, outputs[2] if center else None, outputs[1], offset, eps, False)
    return outputs


@rms_norm_apply_op.backend("cpp", "cpu")
def _apply_cpp(x, weight, bias, mean, rstd, offset):
    y = _apply_fake(x, weight, bias, mean, rstd, offset)
    _run_cpp(x, y, weight, bias, mean, rstd, offset, 0.0, True)
    return y


@rms_norm_backward_op.backend("cpp", "cpu")
def _backward_cpp(dy, x, weight, mean, rstd, offset, need_weight, need_bias):
    outputs = _backward_fake(dy, x, weight, mean, rstd, offset, need_weight, need_bias)
    gain = _gain(x, weight, offset)
    pointers = _pointers(dy, x, gain, mean, rstd, *_wanted(outputs, need_weight, need_bias))
    extension("_cpu").norm_backward(*pointers, *x.shape, dtype_name(x.dtype), torch.get_num_threads())
    return outputs


def _too_wide(x, *_):
    if x.shape[1] > MAX_TRITON_COLUMNS:
        return f"{x.shape[1]} columns exceed the {MAX_TRITON_COLUMNS} that one program holds"
    return None


@rms_norm_op.backend("triton", "cuda", why_not=_too_wide)
def _triton(x, weight, bias, eps, offset, center):
    outputs = _fake(x, weight, bias, eps, offset, center)
    kernels("rms_norm").rms_norm(x, weight, bias, outputs[0], outputs[2] if center else None, outputs[1], eps, offset)
    return outputs


@rms_norm_apply_op.backend("triton", "cuda", why_not=_too_wide)
def _apply_triton(x, weight, bias, mean, rstd, offset):
    y = _apply_fake(x, weight, bias, mean, rstd, offset)
    kernels("rms_norm").rms_norm_apply(x, weight, bias, y, mean, rstd, offset)
    return y


@rms_norm_backward_op.backend("triton", "cuda", why_not=_too_wide)
def _backward_triton(dy, x, weight, mean, rstd, offset, need_weight, need_bias):
    outputs = _backward_fake(dy, x, weight, mean, rstd, offset, need_weight, need_bias)
    kernels("rms_norm").rms_norm_backward(dy, x, weight, mean, rstd, *_wanted(outputs, need_weight, need_bias), offset)
    return outputs


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    center: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y = (x - mean) · rstd · (offset + weight) + bias, row by row, with rstd = 1 / √(mean((x - mean)²) + eps).

    RMSNorm is center=False, where mean counts as 0; LayerNorm is center=True.

    Args:
        x: (M, K) f64 | f32 | bf16 | f16, any strides.
        weight, bias: (K,) or None, in a dtype of their own (f64 only with an f64 x). Without a weight the factor is 1.
        offset: 0, or 1 where the weight is stored less 1, as in Gemma.   eps: in units of x².
    Returns: y (M, K), dtype of x, contiguous; mean (M,), None if not centred; rstd (M,). Statistics are f32 (f64 for an
        f64 x). No gradient: see rms_norm_backward.
    Numerics: all arithmetic in f32 (f64 for an f64 x), y rounded once. The variance takes a second pass over the row,
        so a large mean does not cancel it.
    Saved for backward: nothing here; the caller keeps x and the statistics, 4 or 8 bytes a row.
    Raises: ValueError for an x that is not (M, K) with K of at least 1, or a weight or bias that is not (K,).
    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; Ba et al. 2016, arXiv:1607.06450, eq. 3.
    """
    y, rstd, *mean = rms_norm_op(x.contiguous(), _contiguous(weight), _contiguous(bias), eps, offset, center)
    return y, mean[0] if mean else None, rstd


def rms_norm_apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor, offset: float = 0.0
) -> Tensor:
    """y of rms_norm again, from its saved statistics: equal bit for bit on the backend that computed them.

    Args:
        x, weight, bias, offset: as given to rms_norm.   mean, rstd: as rms_norm returned them.
    Returns: y (M, K), dtype of x, contiguous. No gradient.
    Numerics: as rms_norm; element by element, without a reduction.
    Saved for backward: nothing.
    Raises: ValueError as rms_norm, and for statistics of another shape or dtype.
    """
    return rms_norm_apply_op(x.contiguous(), _contiguous(weight), _contiguous(bias), mean, rstd, offset)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float = 0.0,
    need_weight: bool = True,
    need_bias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx = rstd · (g - mean(g) - x̂ · mean(g · x̂)), g = dy · (offset + weight), x̂ = (x - mean) · rstd; without mean(g)
    if not centred. dweight = Σ_rows dy · x̂, dbias = Σ_rows dy.

    Args:
        dy: (M, K), dtype of x, any strides (expanded too).   x, weight, offset: as given to rms_norm.
        mean, rstd: as rms_norm returned them.
        need_weight, need_bias: compute dweight, dbias.
    Returns: dx (M, K), dtype of x; dweight (K,) and dbias (K,), f32 (f64 for an f64 x), None if not needed.
    Numerics: all arithmetic in f32 (f64 for an f64 x), dx rounded once. Sums over rows are deterministic: the same
        bits whatever the number of threads.
    Saved for backward: nothing. The C++ and Triton backends take a buffer of M / 64 rows (Triton: at most 512) of K.
    Raises: ValueError as rms_norm_apply, and for a dy of another shape or dtype than x.
    """
    outputs = rms_norm_backward_op(
        dy.contiguous(), x.contiguous(), _contiguous(weight), mean, rstd, offset, need_weight, need_bias
    )
    return _wanted(outputs, need_weight, need_bias)
