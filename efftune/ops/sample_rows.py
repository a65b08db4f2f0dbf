"""k of M rows, drawn by scores so that a sum over the M rows is estimated without bias from the k."""

from __future__ import annotations

import torch
from torch import Tensor

from efftune.ops import philox
from efftune.ops._available import ROWS, dtype_name, extension, kernels, why_not
from efftune.ops._op import Op

SAMPLERS = ("systematic", "wta", "crs", "topk")
MAX_CUDA_ROWS = 8192  # one block sorts them in shared memory and registers


# ---- row_norms


def _check_matrix(name: str, x: Tensor) -> None:
    if x.ndim != 2 or not x.dtype.is_floating_point:
        raise ValueError(f"{name} takes a floating-point matrix (M, K), not {x.dtype} with {x.ndim} dimensions.")


def _norms_fake(x):
    _check_matrix("row_norms", x)
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _norms_reference(x):
    wide = torch.promote_types(x.dtype, torch.float32)
    return _norms_fake(x).copy_(x.to(wide).square().sum(1).sqrt())


row_norms_op = Op("row_norms(Tensor x) -> Tensor", _norms_reference, _norms_fake)


@row_norms_op.backend("cpp", "cpu", layout=ROWS)
def _norms_cpp(x):
    out = _norms_fake(x)
    dtype = dtype_name(x.dtype)
    extension("_cpu").row_norms(x.data_ptr(), x.stride(0), out.data_ptr(), *x.shape, dtype, torch.get_num_threads())
    return out


@row_norms_op.backend("triton", "cuda", layout=ROWS)
def _norms_triton(x):
    out = _norms_fake(x)
    kernels("sample_rows").row_norms(x, out)
    return out


def row_norms(x: Tensor) -> Tensor:
    """‖x_i‖₂ of each row.

    Args:
        x: (M, K) f64 | f32 | bf16 | f16.
    Returns: (M,) f32. No gradient.
    Numerics: squares and their sum in f32 (f64 for f64), in one pass: above 1.8e19 a norm is infinite, and elements
        below 1e-23 count as 0. The C++ kernel adds in the same order on every instruction set.
    Saved for backward: nothing.
    Raises: ValueError for anything but a floating-point matrix.
    """
    return row_norms_op(x)


# ---- select_rows


def _check_draw(name: str, k: int, seed: Tensor, sampler: str, stream: int) -> None:
    if k < 1:
        raise ValueError(f"{name} keeps at least 1 row, not {k}.")
    if seed.device.type != "cpu" or seed.dtype != torch.int64 or seed.ndim != 0:
        raise ValueError(f"{name} takes its seed as a 0-d int64 tensor on the CPU; make it with draw_seed().")
    if sampler not in SAMPLERS:
        raise ValueError(f"{name} has the samplers {', '.join(SAMPLERS)}, not {sampler!r}.")
    if not 0 <= stream < 2**32:
        raise ValueError(f"{name} takes a stream in [0, 2^32), not {stream}; hash the layer's name to 32 bits.")


def _select_fake(scores, k, seed, sampler, stream):
    if scores.ndim != 1 or scores.dtype != torch.float32:
        raise ValueError(f"select_rows takes scores (M,) in float32, not {scores.dtype} with {scores.ndim} dimensions.")
    _check_draw("select_rows", k, seed, sampler, stream)
    count = min(k, scores.shape[0])
    return scores.new_empty(count, dtype=torch.int64), scores.new_empty(count), scores.new_empty((), dtype=torch.int32)


def _quantized(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores as integers of at most 2^bits, and whether they had to be replaced by uniform ones. Sums of integers
    are exact and the same in any order, so that all backends draw the same rows, and Σπ = k without an error."""
    m = scores.shape[0]
    fallback = ~(scores.isfinite() & (scores >= 0)).all() | (scores.amax() <= 0)
    scores = torch.where(fallback, 1.0, scores).to(torch.float64)
    bits = 62 - (m - 1).bit_length()  # M scores, or k times one of them, stay below 2^62
    codes = (scores / scores.amax() * 2.0**bits).to(torch.int64)
    # A positive score may be small, but it is not nothing. If fewer than k rows are positive, the others share what
    # remains of k.
    least = (scores > 0) | ((scores > 0).sum() < k)
    return torch.maximum(codes, least.to(torch.int64)), fallback


def _systematic(r: Tensor, t: Tensor, rest: Tensor, n: Tensor) -> Tensor:
    """⌊(r + t·rest) / n⌋ for r in [0, rest), t < n: points rest/n apart, without the product, which would overflow."""
    return t * (rest // n) + (r + t * (rest % n)) // n


def _select_reference(scores, k, seed, sampler, stream, words=philox.philox):
    idx, weight, fallback = _select_fake(scores, k, seed, sampler, stream)
    m, device = scores.shape[0], scores.device
    if k >= m:
        return torch.arange(m, out=idx), weight.fill_(1), fallback.zero_()
    codes, replaced = _quantized(scores, k)
    descending, order = codes.sort(descending=True, stable=True)
    below = codes.sum() - descending.cumsum(0) + descending  # below[c]: the mass without the c largest

    # The c largest rows are taken with weight 1; n = k - c rows are drawn from the others.
    t, left = torch.arange(k, device=device), k - torch.arange(k, device=device)
    if sampler == "systematic":  # water-filling: a row saturates if its share of the n draws would exceed 1
        c = (left * descending[:k] > below[:k]).sum()
    elif sampler == "wta":
        c = (below[:k].to(torch.float64) / left).argmin()
    else:
        c = torch.full((), k if sampler == "topk" else 0, device=device)
    n = k - c
    taken = torch.zeros(m, dtype=torch.bool, device=device).scatter_(0, order, torch.arange(m, device=device) < c)
    open_codes = codes.masked_fill(taken, 0)
    rest = open_codes.sum()
    if sampler == "topk":
        rows = order[:k]
    else:
        if sampler == "systematic":
            keys = philox.order_word(int(seed), stream, 0, m, device, words)
            line, u, d = keys.sort(stable=True).indices, philox.uniform(int(seed), stream, 0, 1, device, words), t - c
        else:
            line, u, d = None, philox.uniform(int(seed), stream, 0, k, device, words), t
        point = torch.minimum((u * rest.to(torch.float64)).to(torch.int64), rest - 1)
        if line is not None:
            point = _systematic(point, d.clamp(min=0), rest, n)
        cumulative = (open_codes if line is None else open_codes[line]).cumsum(0)
        drawn = torch.searchsorted(cumulative, point, right=True)
        rows = torch.where(t < c, order[:k], drawn if line is None else line[drawn])
    idx.copy_(rows.sort().values)
    each = torch.where(taken, 1.0, rest.to(torch.float64) / (n * codes).to(torch.float64))
    return idx, weight.copy_(each[idx]), fallback.copy_(replaced)


select_rows_op = Op(
    "select_rows(Tensor scores, SymInt k, Tensor seed, str sampler, SymInt stream) -> (Tensor, Tensor, Tensor)",
    _select_reference,
    _select_fake,
)


def _select_cuda_why_not(scores, k, seed, sampler, stream):
    if sampler != "systematic":
        return f"{sampler} is composed of torch's operations and a Triton kernel's words"
    if scores.shape[0] > MAX_CUDA_ROWS:
        return f"{scores.shape[0]} rows exceed the {MAX_CUDA_ROWS} that one block sorts"
    return None


def _select_compiled(run, where: int, scores, k, seed, sampler, stream):
    outs = _select_fake(scores, k, seed, sampler, stream)
    pointers = (t.data_ptr() for t in outs)
    run(scores.data_ptr(), scores.shape[0], k, int(seed) % 2**64, stream, SAMPLERS.index(sampler), *pointers, where)
    return outs


@select_rows_op.backend("cpp", "cpu")
def _select_cpp(*args):
    return _select_compiled(extension("_cpu").select_rows, 0, *args)


@select_rows_op.backend("cuda", "cuda", why_not=_select_cuda_why_not)
def _select_cuda(scores, *args):
    with torch.cuda.device(scores.device):
        return _select_compiled(extension("_cuda").select_rows, torch.cuda.current_stream().cuda_stream, scores, *args)


@select_rows_op.backend("triton", "cuda")
def _select_triton(*args):
    """The reference, whose generator would be two thirds of its operations."""
    return _select_reference(*args, words=kernels("sample_rows").words)


def select_rows(
    scores: Tensor, k: int, seed: Tensor, sampler: str = "systematic", stream: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """k rows and their weights: Σ_s weight_s · f(idx_s) estimates Σ_i f(i), without bias for any scores.

    Args:
        scores: (M,) f32, ≥ 0: proportional to how much a row contributes, ‖g_i‖·‖x_i‖ at best. A poor score costs
            variance, never bias, with one exception: a row with score 0 is never drawn while k others are positive. Add
            a floor to the scores of rows that matter.
        k: rows to keep, at least 1.   seed: 0-d int64 on the CPU, from draw_seed().   stream: names the layer.
        sampler: "systematic": k different rows, P(i) = π_i = min(1, a·score_i) with Σπ = k ("water-filling"): rows in
                random order side by side with widths π, and one point in each unit at a common random offset; weight
                1/π_i. Least variance.
            "wta": the c largest with weight 1, c = argmin (1 - P_c)/(k - c) where P_c is their share of the scores; the
                others drawn with replacement, p ∝ score, weight (1 - P_c)/((k - c)·p_j).
            "crs": c = 0: all with replacement, weight 1/(k·p_j).
            "topk": the k largest with weight 1. Biased: it drops the others.
    Returns: idx (min(k, M),) int64, ascending (with replacement: may repeat); weight (min(k, M),) f32; fallback, 0-d
        int32: 1 if the scores were all zero, or one was negative or not finite, and uniform ones were used instead.
        If k ≥ M: all rows with weight exactly 1, and the scores are not looked at.
    Numerics: a function of (scores, k, seed, stream, sampler) alone, the same bits on all backends and devices: scores
        are scaled to integers, at most 2^(62 - ⌈log2 M⌉), positive ones at least 1, and π, p and the weights are exact
        for these integers; a weight is rounded to f32 once. On a GPU nothing waits for the device.
    Saved for backward: nothing.
    Raises: ValueError for scores that are not (M,) f32, k below 1, an unknown sampler, a seed that is not on the CPU.
    Source: Madow 1949 (systematic sampling); Liu et al. 2023, arXiv:2305.15265 (wta and its rule; crs).
    """
    return select_rows_op(scores, k, seed, sampler, stream)


# ---- sample_rows


def _sample_fake(x, factor, k, seed, sampler, stream):
    _check_matrix("sample_rows", x)
    if factor is not None and (factor.shape != x.shape[:1] or factor.dtype != torch.float32):
        raise ValueError(
            f"sample_rows takes a factor ({x.shape[0]},) in float32 for x {tuple(x.shape)}, "
            f"not {tuple(factor.shape)} {factor.dtype}."
        )
    _check_draw("sample_rows", k, seed, sampler, stream)
    count = min(k, x.shape[0])
    rows = x.new_empty(count, x.shape[1])
    idx, weight = x.new_empty(count, dtype=torch.int64), x.new_empty(count, dtype=torch.float32)
    return rows, idx, weight, x.new_empty((), dtype=torch.int32)


def _sample_by(norms, select, gather, x, factor, k, *draw):
    _sample_fake(x, factor, k, *draw)
    # Where all rows are kept nobody looks at the scores.
    scores = x.new_empty(x.shape[0], dtype=torch.float32) if k >= x.shape[0] else norms(x)
    idx, weight, fallback = select(scores if factor is None else scores * factor, k, *draw)
    return gather(x, idx), idx, weight, fallback


def _sample_reference(*args):
    return _sample_by(_norms_reference, _select_reference, lambda x, idx: x.index_select(0, idx), *args)


sample_rows_op = Op(
    "sample_rows(Tensor x, Tensor? factor, SymInt k, Tensor seed, str sampler, SymInt stream)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _sample_reference,
    _sample_fake,
)


def _gather_cpp(x, idx):
    out = x.new_empty(idx.shape[0], x.shape[1])
    pointers = x.data_ptr(), idx.data_ptr(), out.data_ptr()
    extension("_cpu").gather_rows(*pointers, *x.shape, x.stride(0), len(idx), x.itemsize, torch.get_num_threads())
    return out


@sample_rows_op.backend("cpp", "cpu", layout=ROWS, of="x")
def _sample_cpp(*args):
    return _sample_by(_norms_cpp, _select_cpp, _gather_cpp, *args)


@sample_rows_op.backend("triton", "cuda", layout=ROWS, of="x")
def _sample_triton(*args):
    def select(*a):
        return (_select_triton if why_not("cuda", a[0]) or _select_cuda_why_not(*a) else _select_cuda)(*a)

    return _sample_by(_norms_triton, select, kernels("sample_rows").gather_rows, *args)


def sample_rows(
    x: Tensor, factor: Tensor | None, k: int, seed: Tensor, sampler: str = "systematic", stream: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of x that `select_rows` draws by the scores ‖x_i‖·factor_i, with their indices, out of one operator.

    Args:
        x: (M, K) f64 | f32 | bf16 | f16.   factor: (M,) f32, ≥ 0, or None for 1; for the gradient gᵀx an estimate of
            ‖g_i‖, and positive wherever g_i may not be 0.
        k, seed, sampler, stream: as in `select_rows`.
    Returns: rows (S, K) = x[idx], a copy, not scaled; idx (S,), weight (S,), fallback as from `select_rows`;
        S = min(k, M). `rows_grad(g, idx, weight, rows)` then estimates gᵀx.
    Numerics: as `row_norms` and `select_rows`. Backends add up a norm in different orders and may then draw different
        rows, of the same distribution; on one backend the same seed gives the same bits.
    Saved for backward: nothing; the caller saves the results, S·(K + 12 / itemsize) elements.
    Raises: ValueError as `row_norms` and `select_rows`, and for a factor of another shape or dtype.
    Source: Liu et al. 2023, arXiv:2305.15265.
    """
    return sample_rows_op(x, factor, k, seed, sampler, stream)
