"""Masked: a few entries of W are on or off, by scores that train."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from efftune.errors import EfftuneError
from efftune.linear.delta.entries import Entries


@dataclass(frozen=True)
class Masked(Entries):
    """y = x·Wᵀ + bias, where W[i] = original[i] if values[i] > threshold, else 0, at the entries i that were picked,
    and W elsewhere.

    As with `Entries`, W holds what is trained. What trains are the scores `values`, which begin at `init`, so that all
    entries are on. An entry that leaves the picks stays on or off. Of one that comes back, or is loaded from a file of
    weights, only that is known: its score is then `init` or `threshold`.

    Args:
        density, r: see `Entries`.   threshold: scores above it leave an entry on.   init: above `threshold`.
    Shapes: see `Entries`; `values` (S,) are scores.
    Gradients: x, values (and the bias, if it trains); dvalues[i] = (dyᵀ·z̃)[i] · original[i], the straight-through
        estimate: that of a mask which the score itself multiplies.
    Numerics: as with `Entries`, and dvalues is rounded once more in float32.
    Saved for backward: keep(x), and only if values trains.
    Raises: EfftuneError as `Entries`, and for an `init` that is not above `threshold`.
    Source: Mallya et al. 2018, arXiv:1801.06519 (Piggyback), whose threshold and beginning these are.
    """

    threshold: float = 5e-3
    init: float = 1e-2

    def __post_init__(self):
        super().__post_init__()
        if not self.init > self.threshold:
            raise EfftuneError(
                f"scores begin above the threshold, so that the model is at first what it was: give an init above "
                f"{self.threshold}, not {self.init}."
            )

    def beside(self):
        return self  # a mask is one of numbers that can become 0 and come back

    def change_of(self, original, values):
        return torch.where(values > self.threshold, 0, -original.to(values.dtype))

    def values_of(self, original, change):
        return torch.where(change == 0, self.init, torch.full_like(change, self.threshold))

    def backward(self, c, dy, saved, add=None):
        dx, dw, dp = super().backward(c, dy, saved, add)
        if dp[2] is not None:
            dp[2].mul_(c.p[1])  # made by this call
        return dx, dw, dp
