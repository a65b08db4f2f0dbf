"""Dropout whose mask is drawn again from a seed, never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from efftune.ops import philox
from efftune.ops._available import dtype_name, extension, kernels
from efftune.ops._divide import divide
from efftune.ops._op import Op, contiguous_like


def _threshold(p: float) -> int:
    return int(p * 2**32)  # a power of two: exact, then floored


def _reference(x, p, seed, stream):
    _check(x, p, seed, stream)
    words = philox.dropout_word(int(seed), stream, 0, x.numel(), x.device).view(x.shape)
    keep = words >= _threshold(p)
    if x.dtype == torch.float64:
        return torch.where(keep, divide(x, 1 - p), 0.0)
    scale = torch.tensor(1 / (1 - p), dtype=torch.float32, device=x.device)
    return torch.where(keep, x.float() * scale, 0.0).to(x.dtype).contiguous()


def _check(x, p, seed, stream):
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        raise ValueError(f"dropout takes float64, float32, bfloat16 or float16, not {x.dtype}.")
    if not 0 <= p < 1:
        raise ValueError(f"dropout takes p in [0, 1), not {p}.")
    if seed.device.type != "cpu" or seed.dtype != torch.int64 or seed.ndim != 0:
        raise ValueError("dropout takes its seed as a 0-d int64 tensor on the CPU; make it with draw_seed().")
    if not 0 <= stream < 2**32:
        raise ValueError(f"dropout takes a stream in [0, 2^32), not {stream}; hash the parameter's name to 32 bits.")


def _fake(x, p, seed, stream):
    _check(x, p, seed, stream)
    return contiguous_like(x)


dropout_op = Op("dropout(Tensor x, float p, Tensor seed, SymInt stream) -> Tensor", _reference, _fake)


@dropout_op.backend("cpp", "cpu")
def _cpp(x, p, seed, stream):
    out = _fake(x, p, seed, stream)
    extension("_cpu").dropout(
        x.data_ptr(),
        out.data_ptr(),
        x.numel(),
        dtype_name(x.dtype),
        _threshold(p),
        1 / (1 - p),
        int(seed) % 2**64,
        stream,
        torch.get_num_threads(),
    )
    return out


@dropout_op.backend("triton", "cuda")
def _triton(x, p, seed, stream):
    out = _fake(x, p, seed, stream)
    kernels("dropout").dropout(x, out, _threshold(p), 1 / (1 - p), int(seed), stream)
    return out


def dropout(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """y_i = x_i / (1 - p) where word(seed, stream, i) ≥ ⌊p · 2^32⌋, else 0; i the linear index of contiguous x.

    Applied to dy with the same arguments it is its own backward; the caller's autograd.Function does that.

    Args:
        x: any shape, f64 | f32 | bf16 | f16.   p: in [0, 1).
        seed: 0-d int64 on the CPU (`draw_seed()`): a traced graph carries it, and reading it never waits for a GPU.
        stream: separates uses of one seed, in [0, 2^32).
    Returns: like x, contiguous. p = 0 gives x bit for bit.
    Numerics: x times float32(1 / (1 - p)) in float32, rounded once; the mask is equal bit for bit on all backends.
    Saved for backward: nothing; the caller keeps seed, 8 bytes.
    Raises: ValueError for p outside [0, 1), an integer x, or a seed that is not 0-d int64 on the CPU.
    Source: Srivastava et al. 2014, JMLR 15; Salmon et al. 2011 (Philox).
    """
    return dropout_op(x, p, seed, stream)
