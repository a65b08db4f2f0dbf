"""out = w + a z, z drawn again from (seed, stream) whenever it is wanted, never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from efftune.ops import philox
from efftune.ops._available import cpp_why_not, cuda_why_not, extension, triton_why_not
from efftune.ops._op import Op

_STORED = (torch.float32, torch.bfloat16, torch.float16)


def _reference(w, out, a, seed, stream, offset, dist, rounding):
    _check(w, out, a, seed, stream, offset, dist, rounding)
    offsets = torch.arange(offset, offset + w.numel(), device=w.device)
    z = (philox.normal if dist == "normal" else philox.sign)(seed, stream, offsets).view(w.shape)
    if w.dtype == torch.float64:
        out.copy_(w + a * z)
        return
    y = w.float() + torch.tensor(a, dtype=torch.float32, device=w.device) * z.float()
    if rounding == "stochastic":
        y = philox.round_stochastic(y, w.dtype, philox.rounding_bits(seed, stream, offsets).view(w.shape))
    out.copy_(y)


def _check(w, out, a, seed, stream, offset, dist, rounding):
    if not w.dtype.is_floating_point or w.dtype.itemsize < 2:
        raise ValueError(
            f"perturb takes float64, float32, bfloat16 or float16, not {w.dtype}; perturb the tensor that trains."
        )
    if out.shape != w.shape or out.dtype != w.dtype or out.device != w.device:
        raise ValueError(
            f"perturb needs out like w, {tuple(w.shape)} {w.dtype} on {w.device}, "
            f"not {tuple(out.shape)} {out.dtype} on {out.device}; make it with torch.empty_like(w)."
        )
    if dist not in ("normal", "rademacher"):
        raise ValueError(f"perturb draws dist='normal' or 'rademacher', not {dist!r}.")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"perturb rounds by rounding='nearest' or 'stochastic', not {rounding!r}.")
    if not 0 <= stream < 2**32:
        raise ValueError(f"perturb takes a stream in [0, 2^32), not {stream}; hash the name to 32 bits.")
    if offset < 0:
        raise ValueError(f"perturb takes an offset of at least 0, not {offset}; it is the place of w[0] in the whole.")


# Symbolic integers: a compiled function then takes any seed without being compiled again. For a new `a` it is, unless
# torch._dynamo.config.specialize_float is off.
perturb_op = Op(
    "perturb(Tensor w, Tensor(a!) out, float a, SymInt seed, SymInt stream, SymInt offset, str dist, str rounding)"
    " -> ()",
    _reference,
    _check,
)


def _dtype_why_not(w: Tensor) -> str | None:
    return None if w.dtype in _STORED else f"{w.dtype} is computed by the reference"


def _cpp_why_not(w, out, *_):
    return cpp_why_not(w, out) or _dtype_why_not(w)


def _triton_why_not(w, out, *_):
    if not (w.is_contiguous() and out.is_contiguous()):
        return "the Triton kernel takes contiguous tensors"
    return triton_why_not(w, out) or _dtype_why_not(w)


def _cuda_why_not(w, out, *_):
    return cuda_why_not(w, out) or _dtype_why_not(w)


def _written(out: Tensor) -> None:
    # Autograd's check that a saved tensor was not changed since sees only what torch's own kernels write.
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _compiled(extension_name: str, where: int, w, out, a, seed, stream, offset, dist, rounding) -> None:
    _check(w, out, a, seed, stream, offset, dist, rounding)
    signs, stochastic = dist == "rademacher", rounding == "stochastic"
    dtype = str(w.dtype).removeprefix("torch.")
    run = extension(extension_name).perturb
    run(w.data_ptr(), out.data_ptr(), w.numel(), dtype, a, seed % 2**64, stream, offset, signs, stochastic, where)
    _written(out)


@perturb_op.backend("cpp", "cpu", why_not=_cpp_why_not)
def _cpp(*args):
    _compiled("_cpu", torch.get_num_threads(), *args)


@perturb_op.backend("triton", "cuda", why_not=_triton_why_not)
def _triton(w, out, a, seed, stream, offset, dist, rounding):
    from efftune.triton_kernels.perturb import perturb

    _check(w, out, a, seed, stream, offset, dist, rounding)
    perturb(w, out, a, seed, stream, offset, dist == "rademacher", rounding == "stochastic")
    _written(out)


@perturb_op.backend("cuda", "cuda", why_not=_cuda_why_not)
def _cuda(w, *args):
    with torch.cuda.device(w.device):
        _compiled("_cuda", torch.cuda.current_stream().cuda_stream, w, *args)


def perturb(
    w: Tensor,
    a: float,
    *,
    seed: int,
    stream: int,
    offset: int = 0,
    dist: str = "normal",
    rounding: str = "nearest",
    out: Tensor | None = None,
) -> Tensor:
    """out_i = w_i + a · z(seed, stream, offset + i), i the linear index.

    Args:
        w: any shape, f64 | f32 | bf16 | f16.   a: a number, pinned to float32 (float64 for a float64 w).
        seed: 64 bits.   stream: names the parameter, in [0, 2^32).
        offset: place of w's first element in the whole tensor; shards that pass theirs get the z of the whole.
        dist: "normal" (z ~ N(0, 1)) or "rademacher" (z = ±1).
        rounding: "nearest" or "stochastic" (E[out] = w + a z; nothing to do for f32 and f64).
        out: like w; w itself for in place (`perturb_`). Other overlaps give undefined results.
    Returns: out, or a new tensor. No gradient: w and out are taken as they are.
    Numerics: z by Philox4x32-10 and Box–Muller, a function of (seed, stream, offset + i) alone: not of dtype, tiling,
        thread count or device. The sum is computed in float32 and rounded to w.dtype once. ±1 and the bits for rounding
        are equal bit for bit on all backends, normals on all CPUs, and to a few float32 ulps elsewhere. Stochastic
        rounding is exact in probability, for float16 subnormals to 2^-17 of a step; above the largest finite number it
        may give infinity where nearest rounding does not.
    Saved for backward: nothing.
    Raises: ValueError for an integer tensor, an out unlike w, an unknown dist or rounding, a negative offset.
    Source: Salmon et al. 2011 (Philox); Malladi et al. 2023, arXiv:2305.17333, algorithm 1.
    """
    w = w.detach()
    out = torch.empty_like(w) if out is None else out.detach()
    perturb_op(w, out, a, seed, stream, offset, dist, rounding)
    return out


def perturb_(
    w: Tensor,
    a: float,
    *,
    seed: int,
    stream: int,
    offset: int = 0,
    dist: str = "normal",
    rounding: str = "nearest",
) -> Tensor:
    """w_i += a · z(seed, stream, offset + i), in place, without a buffer for z; see `perturb`. Returns w."""
    perturb(w, a, seed=seed, stream=stream, offset=offset, dist=dist, rounding=rounding, out=w)
    return w
