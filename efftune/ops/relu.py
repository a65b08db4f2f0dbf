"""relu that tells its derivative in one bit an element, and the gradient from these bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from efftune.ops._available import dtype_name, extension, kernels
from efftune.ops._op import Op, contiguous_like

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fake(x):
    if x.dtype not in _FLOATS:
        raise ValueError(f"relu takes float64 | 32 | 16 or bfloat16, not {x.dtype}.")
    return contiguous_like(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _reference(x):
    y, bits = _fake(x)
    on = (~(x <= 0)).flatten().to(torch.uint8)
    eights = F.pad(on, (0, -on.numel() % 8)).view(-1, 8) << torch.arange(8, device=x.device, dtype=torch.uint8)
    return y.copy_(torch.where(x < 0, 0, x)), bits.copy_(eights.sum(-1))


def _backward_fake(dy, bits):
    if dy.dtype not in _FLOATS or bits.dtype != torch.uint8 or bits.shape != ((dy.numel() + 7) // 8,):
        raise ValueError(
            f"relu_backward takes dy in float64 | 32 | 16 or bfloat16, and its bits ({(dy.numel() + 7) // 8},) in "
            f"uint8, not {dy.dtype} and {bits.dtype} {tuple(bits.shape)}."
        )
    return contiguous_like(dy)


def _backward_reference(dy, bits):
    dx = _backward_fake(dy, bits)
    on = bits[:, None] >> torch.arange(8, device=dy.device, dtype=torch.uint8) & 1
    return dx.copy_(torch.where(on.flatten()[: dy.numel()].view(dy.shape) != 0, dy, 0))


relu_op = Op("relu(Tensor x) -> (Tensor, Tensor)", _reference, _fake)
relu_backward_op = Op("relu_backward(Tensor dy, Tensor bits) -> Tensor", _backward_reference, _backward_fake)


def _run_cpp(x, y, bits, backward):
    extension("_cpu").relu(
        x.data_ptr(), y.data_ptr(), bits.data_ptr(), x.numel(), dtype_name(x.dtype), backward, torch.get_num_threads()
    )


@relu_op.backend("cpp", "cpu")
def _cpp(x):
    y, bits = _fake(x)
    _run_cpp(x, y, bits, False)
    return y, bits


@relu_backward_op.backend("cpp", "cpu")
def _backward_cpp(dy, bits):
    dx = _backward_fake(dy, bits)
    _run_cpp(dy, dx, bits, True)
    return dx


@relu_op.backend("triton", "cuda")
def _triton(x):
    y, bits = _fake(x)
    kernels("relu").relu(x, y, bits)
    return y, bits


@relu_backward_op.backend("triton", "cuda")
def _backward_triton(dy, bits):
    dx = _backward_fake(dy, bits)
    kernels("relu").relu_backward(dy, bits, dx)
    return dx


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """y = max(x, 0), which is -0 for -0, and one bit an element that says whether its derivative is 1.

    Args:
        x: of any shape, f64 | f32 | bf16 | f16; a copy is made of one that is not contiguous.
    Returns: y like x, contiguous, and bits (⌈numel / 8⌉,) uint8: element i of contiguous x is bit i mod 8 of byte
        ⌊i / 8⌋. The bit is 1[x > 0], and 1 for NaN, as torch's derivative is. No gradient: see relu_backward.
    Numerics: exact.
    Saved for backward: nothing here; the bits are what a caller saves, an eighth of a byte an element.
    Raises: ValueError for another dtype.
    """
    return relu_op(x.contiguous())


def relu_backward(dy: Tensor, bits: Tensor) -> Tensor:
    """dx = dy where the bit of the element is 1, else 0.

    Args:
        dy: of the shape of x, any float dtype.   bits: as `relu` gives them.
    Returns: dx like dy, contiguous.
    Numerics: exact.
    Saved for backward: nothing.
    Raises: ValueError for bits of another number or dtype.
    """
    return relu_backward_op(dy.contiguous(), bits)
