"""Sampled: backward keeps a random, reweighted part of the input's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear.contracts import Keep, Kept, product_t
from efftune.linear.handle import Handle, Source, load
from efftune.ops.rows_grad import rows_grad
from efftune.ops.sample_rows import row_norms, sample_rows, select_rows

SAMPLERS = ("systematic", "wta", "crs", "topk")
_fallbacks: dict[torch.device, Tensor] = {}


@dataclass(frozen=True)
class Sampled(Keep):
    """gᵀ·z̃ = Σ over k of the M rows of weight_i · g_i z_iᵀ, unbiased; dx stays exact. k = max(min_rows, ⌊ratio·M⌋).

    Row i is drawn with a probability that grows with ‖z_i‖ · (what is known of ‖g_i‖):
    - where backward can make z again from tensors it holds anyway, or with at="backward" where it keeps z itself, rows
      are drawn in backward with the true ‖g_i‖: no memory is saved by it, but the product shrinks by the ratio;
    - else in forward, with the scores of `TokenScores` for ‖g_i‖ where the layer has them, and k rows are kept. Layers
      that read the same input share one sample.

    Args:
        ratio: in (0, 1]; at 1, or where M ≤ k, bit for bit what `Exact` gives.
        sampler: "systematic" (fixed size, without replacement; the least variance), "wta" (the paper's), "crs".
            "topk" keeps the largest rows and is biased; it is here for comparisons.
        min_rows: rows that are kept at least.   at: "forward" or "backward".
    Saved: k·K elements and 12 bytes a kept row; or 4 bytes a row beside what is held anyway.
    Raises: EfftuneError for a ratio outside (0, 1] and unknown samplers.
    Source: Liu et al. 2023, arXiv:2305.15265 (WTA-CRS); systematic sampling: Madow 1949.
    """

    ratio: float = 0.3
    sampler: str = "systematic"
    min_rows: int = 16
    at: str = "forward"

    random = True

    def __post_init__(self):
        if not 0.0 < self.ratio <= 1.0:
            raise EfftuneError(f"the ratio of kept rows lies in (0, 1], not {self.ratio}.")
        if self.sampler not in SAMPLERS:
            raise EfftuneError(f"sampler is one of {', '.join(SAMPLERS)}, not {self.sampler!r}.")
        if self.min_rows < 1:
            raise EfftuneError(f"at least one row is kept, so min_rows is at least 1, not {self.min_rows}.")
        if self.at not in ("forward", "backward"):
            raise EfftuneError(f"rows are drawn at 'forward' or at 'backward', not {self.at!r}.")

    def rows(self, m: int) -> int:
        """How many of m rows are kept."""
        return min(m, max(self.min_rows, int(self.ratio * m)))

    def shared(self, rows, source):
        return self.rows(rows) == rows or (source is not None and self.at == "forward" and _held(source) is None)

    def save(self, z, source, seed):
        handle = _held(source)
        m = z.shape[0]
        if self.rows(m) == m:
            return (z if handle is None else handle.keep(),)
        if handle is not None or self.at == "backward":
            norms = _once(source, "norms", lambda: (row_norms(z),))[0]
            return z if handle is None else handle.keep(), norms, seed
        factor = source.scores if source is not None else None
        return _once(source, self, lambda: self._sample(z, factor, seed))

    def _sample(self, z: Tensor, factor: Tensor | None, seed: Tensor | None) -> tuple[Tensor, ...]:
        assert seed is not None  # a keep that draws gets one
        rows, idx, weight, fallback = sample_rows(z, factor, self.rows(z.shape[0]), seed, self.sampler)
        _count(fallback)
        return rows, idx, weight

    def operands(self, g, kept):
        if len(kept) == 1:
            return g, load(kept[0])
        idx, weight, rows = self._sampled(g, kept)
        return (g.index_select(0, idx) * weight[:, None]).to(g.dtype), rows

    def weight_grad(self, g, kept):
        if len(kept) == 1:
            return product_t(g, load(kept[0]))
        return rows_grad(g, *self._sampled(g, kept))

    def _sampled(self, g: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        """Indices and weights (k,) of the sample, and its rows of z (k, K)."""
        if not cast(Tensor, kept[1]).is_floating_point():
            rows, idx, weight = cast(tuple[Tensor, Tensor, Tensor], kept)
            return idx, weight, rows
        z, norms, seed = cast(tuple[Tensor | Handle, Tensor, Tensor], kept)
        indices, weights = self.select((norms * row_norms(g))[None], seed)
        return indices[0], weights[0], load(z, indices[0])

    def select(self, scores: Tensor, seed: Tensor, stream: int = 0) -> tuple[Tensor, Tensor]:
        """Rows drawn in backward, where ‖g_i‖·‖z_i‖ is known, of N products at once: scores (N, M) float32 -> indices
        and weights (N, k). Product i draws from stream + i."""
        k = self.rows(scores.shape[1])
        drawn = [select_rows(each, k, seed, self.sampler, stream + i) for i, each in enumerate(scores)]
        idx, weight, fallback = (torch.stack(part) for part in zip(*drawn, strict=True))
        # Where all scores are zero the gradient is: nothing fell back to anything.
        _count((fallback * (scores.amax(1) != 0)).sum(dtype=fallback.dtype))
        return idx, weight


def _held(source: Source | None) -> Handle | None:
    """The handle of a tensor that backward can make again from what it holds anyway."""
    handle = None if source is None else source.handle
    return handle if handle is not None and handle.held else None


def _once(source, key, make):
    """make(), once for all layers that read the same tensor."""
    if source is None:
        return make()
    if key not in source.kept:
        source.kept[key] = make()
    return source.kept[key]


def _count(fallback: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    device = fallback.device
    _fallbacks[device] = _fallbacks[device] + fallback if device in _fallbacks else fallback.clone()


def fallbacks() -> int:
    """How many draws of this process had scores that were not finite, or all zero, and took uniform ones instead. Waits
    for the GPU. Draws in compiled graphs are not counted."""
    return sum(int(count) for count in _fallbacks.values())
