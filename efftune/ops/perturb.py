"""out = w + Σ a_k z_k, each z drawn again from (seed, stream) whenever it is wanted, never stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from efftune.ops import philox
from efftune.ops._available import dtype_name, extension, kernels
from efftune.ops._op import Op


def _compute_dtype(w: Tensor) -> torch.dtype:
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def _reference(w, out, a, seeds, stream, offset, dist, rounding, threshold):
    _check(w, out, a, seeds, stream, offset, dist, rounding, threshold)
    place = stream, offset, w.numel(), w.device
    draw = philox.normal if dist == "normal" else philox.sign
    y = x = w.to(_compute_dtype(w))
    for a_k, seed in zip(a.reshape(-1), seeds, strict=True):
        y = y + a_k * draw(seed, *place).view(w.shape).to(x.dtype)
    if rounding == "stochastic" and seeds and w.dtype != torch.float64:
        y = philox.round_stochastic(y, w.dtype, philox.rounding_bits(seeds[0], *place).view(w.shape))
    small = x.abs() <= torch.full((), threshold, dtype=x.dtype, device=w.device)
    out.copy_(torch.where(small, y.to(w.dtype), w))


def _check(w, out, a, seeds, stream, offset, dist, rounding, threshold):
    if not w.dtype.is_floating_point or w.dtype.itemsize < 2:
        raise ValueError(
            f"perturb takes float64, float32, bfloat16 or float16, not {w.dtype}; perturb the tensor that trains."
        )
    if out.shape != w.shape or out.dtype != w.dtype or out.device != w.device:
        raise ValueError(
            f"perturb needs out like w, {tuple(w.shape)} {w.dtype} on {w.device}, "
            f"not {tuple(out.shape)} {out.dtype} on {out.device}; make it with torch.empty_like(w)."
        )
    if a.dtype != _compute_dtype(w) or a.device != w.device:
        raise ValueError(
            f"perturb takes a as {_compute_dtype(w)} on {w.device} for this w, not {a.dtype} on {a.device}; "
            f"move it with a.to({_compute_dtype(w)}) or a.to(w.device)."
        )
    if a.ndim > 1 or a.numel() != len(seeds):
        raise ValueError(
            f"perturb takes one a for each seed, here a tensor ({len(seeds)},), not {tuple(a.shape)}; "
            f"a number or a 0-d tensor goes with one seed."
        )
    if dist not in ("normal", "rademacher"):
        raise ValueError(f"perturb draws dist='normal' or 'rademacher', not {dist!r}.")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"perturb rounds by rounding='nearest' or 'stochastic', not {rounding!r}.")
    if not 0 <= stream < 2**32:
        raise ValueError(f"perturb takes a stream in [0, 2^32), not {stream}; hash the name to 32 bits.")
    if offset < 0:
        raise ValueError(f"perturb takes an offset of at least 0, not {offset}; it is the place of w[0] in the whole.")
    if not threshold >= 0:
        raise ValueError(f"perturb takes a threshold of at least 0 or None for all weights, not {threshold}.")


# `a` is a tensor and the seeds are symbolic integers: a compiled function takes new ones without being compiled again,
# and a scalar that a GPU computed stays there. For a new threshold or another number of seeds it is compiled again.
perturb_op = Op(
    "perturb(Tensor w, Tensor(a!) out, Tensor a, SymInt[] seeds, SymInt stream, SymInt offset, str dist, str rounding,"
    " float threshold) -> ()",
    _reference,
    _check,
)


def _written(out: Tensor) -> None:
    # Autograd's check that a saved tensor was not changed since sees only what torch's own kernels write.
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


@perturb_op.backend("cpp", "cpu", of="w out")
def _cpp(w, out, a, seeds, stream, offset, dist, rounding, threshold):
    _check(w, out, a, seeds, stream, offset, dist, rounding, threshold)
    a, unsigned = a.contiguous(), [s % 2**64 for s in seeds]
    extension("_cpu").perturb(
        w.data_ptr(), out.data_ptr(), w.numel(), dtype_name(w.dtype), a.data_ptr(), unsigned, stream, offset,
        dist == "rademacher", rounding == "stochastic", threshold, torch.get_num_threads(),
    )  # fmt: skip
    _written(out)


def _seeds_beside(w: Tensor, seeds: Sequence[int]) -> Tensor:
    """The seeds where w is, without waiting for a GPU. One alone goes to the kernel as a number and is not copied."""
    if len(seeds) < 2:
        return torch.empty(0, dtype=torch.int64, device=w.device)
    pinned = w.device.type != "cpu"
    return torch.tensor(seeds, dtype=torch.int64, device="cpu", pin_memory=pinned).to(w.device, non_blocking=True)


@perturb_op.backend("triton", "cuda", of="w out")
def _triton(w, out, a, seeds, stream, offset, dist, rounding, threshold):
    _check(w, out, a, seeds, stream, offset, dist, rounding, threshold)
    first, signs, stochastic = seeds[0] if seeds else 0, dist == "rademacher", rounding == "stochastic"
    kernels("perturb").perturb(
        w, out, a.contiguous(), _seeds_beside(w, seeds), first, stream, offset, signs, stochastic, threshold
    )
    _written(out)


@perturb_op.backend("cuda", "cuda", of="w out")
def _cuda(w, out, a, seeds, stream, offset, dist, rounding, threshold):
    _check(w, out, a, seeds, stream, offset, dist, rounding, threshold)
    first, signs, stochastic = seeds[0] % 2**64 if seeds else 0, dist == "rademacher", rounding == "stochastic"
    with torch.cuda.device(w.device):
        a, beside = a.contiguous(), _seeds_beside(w, seeds)
        extension("_cuda").perturb(
            w.data_ptr(), out.data_ptr(), w.numel(), dtype_name(w.dtype), a.data_ptr(), beside.data_ptr(), first,
            len(seeds), stream, offset, signs, stochastic, threshold, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    _written(out)


# For many tensors in a launch or a few: small ones cost what they are, and not what a launch costs. In place with w as
# out. `a` comes first, since the first argument tells the device.
perturb_many_op = Op(
    "perturb_many(Tensor a, Tensor[] w, Tensor(a!)[] out, SymInt[] seeds, SymInt[] streams, str dist, str rounding,"
    " float[] thresholds) -> ()",
    lambda a, w, *rest: _each(perturb_op._dispatch, a, w, *rest),
    lambda a, w, *rest: _each(_check, a, w, *rest),
)


def _each(run, a, w, out, seeds, streams, dist, rounding, thresholds):
    _check_lengths(w, out, streams, thresholds)
    for t, o, stream, threshold in zip(w, out, streams, thresholds, strict=True):
        run(t, o, a, seeds, stream, 0, dist, rounding, threshold)


def _check_lengths(w, out, streams, thresholds):
    if not len(w) == len(out) == len(streams) == len(thresholds):
        raise ValueError(
            f"perturb_many_ takes a stream and a threshold for each tensor, here {len(w)}, "
            f"not {len(streams)} and {len(thresholds)}."
        )


def _check_many(a, w, out, seeds, streams, dist, rounding, thresholds):
    """What `_check` says of each. All is looked at for the first; of the others, since every layer of every forward
    pass comes here, only what they can have of their own."""
    _check_lengths(w, out, streams, thresholds)
    first = w[0]
    dtype, device = first.dtype, first.device
    for t, o, stream, threshold in zip(w, out, streams, thresholds, strict=True):
        alike = t.dtype == dtype and t.device == device and 0 <= stream < 2**32 and threshold >= 0
        if alike and o is not t:
            alike = o.shape == t.shape and o.dtype == dtype and o.device == device
        if t is first or not alike:
            _check(t, o, a, seeds, stream, 0, dist, rounding, threshold)


def _unlike(a, w, out, *_):  # then they go one by one, each to what takes it
    alike = all(t.dtype == w[0].dtype for t in (*w, *out))
    return None if alike else "the kernels take tensors of one dtype"


def _many(run):
    def launch(a, w, out, seeds, streams, dist, rounding, thresholds):
        if not w:
            return
        _check_many(a, w, out, seeds, streams, dist, rounding, thresholds)
        run(a.contiguous(), w, out, seeds, streams, dist == "rademacher", rounding == "stochastic", thresholds)
        torch.autograd.graph.increment_version([t for t in out if not t.is_inference()])

    return launch


@perturb_many_op.backend("cpp", "cpu", of="w out", why_not=_unlike)
@_many
def _cpp_many(a, w, out, seeds, streams, signs, stochastic, thresholds):
    extension("_cpu").perturb_many(
        *_columns(w, out), streams, thresholds, dtype_name(w[0].dtype), a.data_ptr(), [s % 2**64 for s in seeds],
        signs, stochastic, torch.get_num_threads(),
    )  # fmt: skip


def _columns(w, out):
    return [t.data_ptr() for t in w], [t.data_ptr() for t in out], [t.numel() for t in w]


# First on a GPU: its table travels with the launch, where Triton's is a copy and its launch takes longer on the host.
@perturb_many_op.backend("cuda", "cuda", of="w out", why_not=_unlike)
@_many
def _cuda_many(a, w, out, seeds, streams, signs, stochastic, thresholds):
    first, beside = seeds[0] % 2**64 if seeds else 0, _seeds_beside(a, seeds)
    with torch.cuda.device(a.device):
        extension("_cuda").perturb_many(
            *_columns(w, out), streams, thresholds, dtype_name(w[0].dtype), a.data_ptr(), beside.data_ptr(), first,
            len(seeds), signs, stochastic, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip


@perturb_many_op.backend("triton", "cuda", of="w out", why_not=_unlike)
@_many
def _triton_many(a, w, out, seeds, streams, signs, stochastic, thresholds):
    first = seeds[0] if seeds else 0
    kernels("perturb").perturb_many(w, out, a, _seeds_beside(a, seeds), first, streams, signs, stochastic, thresholds)


def _scalar(a: float, w: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # only in arithmetic with a tensor does a number stay symbolic
        return torch.ones((), dtype=_compute_dtype(w), device=w.device) * a
    return torch.full((), a, dtype=_compute_dtype(w), device=w.device)


def perturb(
    w: Tensor,
    a: float | Tensor,
    *,
    seed: int | Sequence[int],
    stream: int,
    offset: int = 0,
    dist: str = "normal",
    rounding: str = "nearest",
    threshold: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """out_i = w_i + Σ_k a_k · z(seed_k, stream, offset + i) where |w_i| ≤ threshold, else w_i; i the linear index.

    Args:
        w: any shape, f64 | f32 | bf16 | f16.
        a: a number, or a tensor () or (K,) on w's device, f32 (f64 for a float64 w). No kernel brings it to the host: a
            scalar that a GPU computed is used there, and nothing waits.
        seed: 64 bits (signed), or a sequence of K of them; as many as a. No seed, with an a of shape (0,), copies w.
        stream: names the parameter, in [0, 2^32).
        offset: place of w's first element in the whole tensor; shards that pass theirs get the z of the whole.
        dist: "normal" (z ~ N(0, 1)) or "rademacher" (z = ±1).
        rounding: "nearest" or "stochastic" (E[out] = w + Σ a z; nothing to do for f32 and f64), with random bits of the
            first seed.
        threshold: None for all weights, or a number of at least 0, pinned to float32 as a is. It is compared with
            w as it was before the call, also in place. NaN is not below any.
        out: like w; w itself for in place (`perturb_`). Other overlaps give undefined results.
    Returns: out, or a new tensor. No gradient: w, a and out are taken as they are.
    Numerics: z by Philox4x32-10 and Box–Muller, a function of (seed, stream, offset + i) alone: not of dtype, tiling,
        thread count or device. The sum is computed in float32 (float64 for a float64 w), from w on and in the order of
        the seeds, and rounded to w.dtype once. So for float32 and float64 a call with K seeds is bit for bit K calls in
        place, as long as there is no threshold. ±1 and the bits for rounding are equal bit for bit on all backends,
        normals on all CPUs, and to a few float32 ulps elsewhere. Stochastic rounding is exact in probability, for
        float16 subnormals to 2^-17 of a step; above the largest finite number it may give infinity where nearest
        rounding does not.
    Cost: each weight is read and written once, whatever K; beyond that, drawing the numbers.
    Saved for backward: nothing.
    Raises: ValueError for an integer tensor, an out unlike w, an a of another dtype, device or number than the seeds
        ask for, an unknown dist or rounding, a negative offset or threshold.
    Source: Salmon et al. 2011 (Philox); Malladi et al. 2023, arXiv:2305.17333, algorithm 1.
    """
    w = w.detach()
    out = torch.empty_like(w) if out is None else out.detach()
    a = a.detach() if isinstance(a, Tensor) else _scalar(a, w)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    perturb_op(w, out, a, seeds, stream, offset, dist, rounding, math.inf if threshold is None else threshold)
    return out


def perturb_(
    w: Tensor,
    a: float | Tensor,
    *,
    seed: int | Sequence[int],
    stream: int,
    offset: int = 0,
    dist: str = "normal",
    rounding: str = "nearest",
    threshold: float | None = None,
) -> Tensor:
    """w_i += Σ_k a_k · z(seed_k, stream, offset + i), in place, without a buffer for z; see `perturb`. Returns w."""
    perturb(
        w, a, seed=seed, stream=stream, offset=offset, dist=dist, rounding=rounding, threshold=threshold, out=w
    )  # fmt: skip
    return w


def perturb_many_(
    w: Sequence[Tensor],
    a: Tensor,
    *,
    seed: int | Sequence[int],
    streams: Sequence[int],
    dist: str = "normal",
    rounding: str = "nearest",
    thresholds: Sequence[float | None] | None = None,
) -> None:
    """`perturb_` of each of `w` with its own stream and threshold, and the same a and seeds, in one call.

    Args:
        w: tensors of one device. On a GPU, contiguous ones of one dtype are one launch (Triton) or one for every 64
            (CUDA C++); others go one by one.
        a, seed, dist, rounding: as for `perturb`, the same for all.   streams, thresholds: one for each tensor.
    Numerics: bit for bit those of `perturb_`, tensor by tensor, on the same backend.
    Saved for backward: nothing.
    Raises: ValueError, as `perturb`, and for another number of streams or thresholds than there are tensors.
    """
    w = [t.detach() if t.requires_grad else t for t in w]
    _perturb_many(w, w, a, seed, streams, dist, rounding, thresholds)


def perturb_many(
    w: Sequence[Tensor],
    a: Tensor,
    *,
    seed: int | Sequence[int],
    streams: Sequence[int],
    dist: str = "normal",
    rounding: str = "nearest",
    thresholds: Sequence[float | None] | None = None,
) -> list[Tensor]:
    """`perturb_many_` into new tensors, which it returns."""
    w = [t.detach() if t.requires_grad else t for t in w]
    out = [torch.empty_like(t) for t in w]
    _perturb_many(w, out, a, seed, streams, dist, rounding, thresholds)
    return out


def _perturb_many(w, out, a, seed, streams, dist, rounding, thresholds):
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    limits = [math.inf if t is None else t for t in ([None] * len(w) if thresholds is None else thresholds)]
    perturb_many_op(a.detach(), w, out, seeds, list(streams), dist, rounding, limits)
