"""Gated activations, act(gate) · up, and plain ones, with their gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from efftune.ops._available import (
    ROWS,
    adjacent,
    dtype_name,
    extension,
    kernels,
)
from efftune.ops._op import Op, contiguous_like

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SQRT_2_PI = math.sqrt(2 / math.pi)


def _silu_slope(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 + x * (1 - s))


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    t = torch.tanh(_SQRT_2_PI * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _SQRT_2_PI * (1 + 3 * 0.044715 * x * x)


_CURVES = {  # name: (value, slope)
    "silu": (F.silu, _silu_slope),
    "gelu": (F.gelu, _gelu_slope),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_slope),
    "relu": (F.relu, lambda x: (~(x <= 0)).to(x.dtype)),  # as torch has it, NaN has slope 1
    "relu2": (lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x)),
}
ACTIVATIONS = tuple(_CURVES)


def composition(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """The formula in torch operations, of any shape, with their own gradients."""
    y = _CURVES[activation][0](gate)
    return y if up is None else y * up


def _check(gate: Tensor, up: Tensor | None, activation: str) -> None:
    if activation not in _CURVES:
        raise ValueError(f"glu takes the activations {', '.join(ACTIVATIONS)}, not {activation!r}.")
    if gate.ndim != 2 or gate.dtype not in _FLOATS:
        raise ValueError(f"glu takes gate (M, F), float64 | 32 | 16 or bfloat16, not {gate.dtype} {tuple(gate.shape)}.")
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise ValueError(
            f"glu needs up like gate, {gate.dtype} {tuple(gate.shape)}, not {up.dtype} {tuple(up.shape)}; split a "
            "merged tensor into halves first."
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _fake(gate, up, activation):
    _check(gate, up, activation)
    return contiguous_like(gate)


def _reference(gate, up, activation):
    out = _fake(gate, up, activation)
    value = _CURVES[activation][0](_wide(gate))
    return out.copy_(value if up is None else value * _wide(up))


def _backward_fake(dy, gate, up, activation):
    _check(gate, up, activation)
    if dy.shape != gate.shape or dy.dtype != gate.dtype:
        raise ValueError(
            f"glu_backward takes dy like gate, {gate.dtype} {tuple(gate.shape)}, not {dy.dtype} {tuple(dy.shape)}."
        )
    return [contiguous_like(gate)] if up is None else [contiguous_like(gate), contiguous_like(up)]


def _backward_reference(dy, gate, up, activation):
    outputs = _backward_fake(dy, gate, up, activation)
    value, slope = _CURVES[activation]
    wide, dy = _wide(gate), _wide(dy)
    gradients = [dy * slope(wide)] if up is None else [dy * _wide(up) * slope(wide), dy * value(wide)]
    return [output.copy_(gradient) for output, gradient in zip(outputs, gradients, strict=True)]


glu_op = Op("glu(Tensor gate, Tensor? up, str activation) -> Tensor", _reference, _fake)
glu_backward_op = Op(  # dgate and, with up, dup
    "glu_backward(Tensor dy, Tensor gate, Tensor? up, str activation) -> Tensor[]",
    _backward_reference,
    _backward_fake,
)


def _run_cpp(dy, gate, up, activation, y, dgate, dup):
    pointers = [0 if t is None else t.data_ptr() for t in (gate, up, dy, y, dgate, dup)]
    strides = [0 if t is None else t.stride(0) for t in (gate, up, dy)]
    dtype, threads = dtype_name(gate.dtype), torch.get_num_threads()
    extension("_cpu").glu(*pointers, *gate.shape, *strides, activation, dtype, threads)


@glu_op.backend("cpp", "cpu", layout=ROWS)
def _cpp(gate, up, activation):
    y = _fake(gate, up, activation)
    _run_cpp(None, gate, up, activation, y, None, None)
    return y


@glu_backward_op.backend("cpp", "cpu", layout=ROWS)
def _backward_cpp(dy, gate, up, activation):
    outputs = _backward_fake(dy, gate, up, activation)
    _run_cpp(dy, gate, up, activation, None, outputs[0], None if up is None else outputs[1])
    return outputs


@glu_op.backend("triton", "cuda", layout=ROWS)
def _triton(gate, up, activation):
    y = _fake(gate, up, activation)
    kernels("glu").glu(gate, up, y, activation)
    return y


@glu_backward_op.backend("triton", "cuda", layout=ROWS)
def _backward_triton(dy, gate, up, activation):
    outputs = _backward_fake(dy, gate, up, activation)
    kernels("glu").glu_backward(dy, gate, up, outputs[0], None if up is None else outputs[1], activation)
    return outputs


def glu(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """y = act(gate) · up, or act(gate) where up is None.

    Args:
        gate, up: (M, F) f64 | f32 | bf16 | f16. Rows may be apart, as in the halves of one merged (M, 2F) tensor; that
            costs no copy.
        activation: "silu", "gelu" (x · Φ(x), exact), "gelu_tanh" (its approximation by tanh), "relu", "relu2" (relu²).
    Returns: (M, F), dtype of gate, contiguous. No gradient: see glu_backward.
    Numerics: all arithmetic in f32 (f64 for an f64 gate), rounded once.
    Saved for backward: nothing here; the caller keeps gate and up.
    Raises: ValueError for another activation, a gate that is not (M, F) and floating-point, or an up unlike gate.
    Source: Shazeer 2020, arXiv:2002.05202, eq. 5; Hendrycks and Gimpel 2016, arXiv:1606.08415; So et al. 2021,
        arXiv:2109.08668 (relu²).
    """
    return glu_op(adjacent(gate), None if up is None else adjacent(up), activation)


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """dgate = dy · up · act'(gate), dup = dy · act(gate); dgate = dy · act'(gate) where up is None.

    Args:
        dy: (M, F), dtype of gate, any strides.   gate, up, activation: as given to glu.
    Returns: dgate (M, F) and dup (M, F), dtype of gate, contiguous; dup is None without up. act'(0) of relu is 0.
    Numerics: all arithmetic in f32 (f64 for an f64 gate), each result rounded once.
    Saved for backward: nothing.
    Raises: ValueError as glu, and for a dy of another shape or dtype than gate.
    """
    dgate, *dup = glu_backward_op(adjacent(dy), adjacent(gate), None if up is None else adjacent(up), activation)
    return dgate, dup[0] if dup else None
