"""Entries: a few entries of W train, in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear.contracts import Delta
from efftune.ops.entries_grad import check_indices, entries_grad


@dataclass(frozen=True)
class Entries(Delta):
    """y = x·Wᵀ + bias, where W[i] = round(original[i] + values[i]) at the entries i that were picked, and W elsewhere.

    W holds what is trained, so that forward and dx are the plain products, and the merged weight is W. What trains is
    `values`, the difference δ: in 16 bits an update of W itself would be lost where it is below half an ulp. Weight
    decay of the optimizer acts on δ alone. An entry that leaves the picks stays in W as it was trained (`left_values`),
    and what it was before is known, so that W comes back bit for bit.

    Args:
        density: the share of W's entries that train, in (0, 1].   r: as many as a LoRA of this rank has, r·(N + K), in
            place of density.
    Shapes: `indices` (S,) int32, sorted, n·K + k for W[n, k]; `original` (S,) in W's dtype; `values` (S,) float32 (over
        a float64 W: float64); `left`, `left_original`, `left_values` (L,) the same of what left, the last in W's dtype.
    Gradients: x, values (and the bias, if it trains); dvalues[i] = (dyᵀ·z̃)[i]; no N × K matrix is made.
    Numerics: products of x's dtype accumulate in float32, and dvalues is float32; W is rounded once, to its dtype.
    Saved for backward: keep(x), and only if values trains.
    Raises: EfftuneError for a density or rank out of range, and for indices that are not sorted, within W and distinct.
    Source: of training in place with packed state: Ansell et al. 2024, arXiv:2401.16405 (SpIEL).
    """

    density: float = 0.01
    r: int | None = None

    names = ("indices", "original", "values", "left", "left_original", "left_values")
    learns = ("values",)
    resizes = names

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise EfftuneError(f"the density of entries that train lies in (0, 1], not {self.density}.")
        if self.r is not None and self.r < 1:
            raise EfftuneError(f"r·(N + K) entries need an r of at least 1, not {self.r}.")

    def count(self, shape: tuple[int, int]) -> int:
        """S for a layer of (N, K)."""
        n, k = shape
        return min(n * k, self.r * (n + k)) if self.r is not None else round(self.density * n * k)

    def why_not(self, base, keep, shape):
        n, k = shape
        if n * k >= 2**31:
            return f"{n} x {k} entries are too many for indices of 32 bits; train this layer by an adapter"
        if self.count(shape) < 1:
            return f"density={self.density} is less than one entry of {n} x {k}; use a larger density or other layers"
        return None

    def begin(self, weight):
        # Which entries train is for the recipe to say, by `repick`; the first ones stand for them until then.
        n, k = weight.shape
        indices = torch.arange(self.count((n, k)), dtype=torch.int32, device=weight.device)
        original = weight.reshape(-1)[: len(indices)].clone()
        values = self.values_of(
            original, torch.zeros_like(original, dtype=torch.promote_types(weight.dtype, torch.float32))
        )
        return weight, (indices, original, values, indices[:0].clone(), original[:0].clone(), original[:0].clone())

    def change_of(self, original: Tensor, values: Tensor) -> Tensor:
        """W - original at the picks, as their values say it: (S,), in the dtype of values."""
        return values

    def values_of(self, original: Tensor, change: Tensor) -> Tensor:
        """Values that say this change. They need not be those that it was made by."""
        return change

    def refuse(self, p, shape):
        for name, beside in (("indices", ("original", "values")), ("left", ("left_original", "left_values"))):
            if name in p and not p[name].is_meta:
                check_indices(p[name], shape)
                for other in beside:
                    if other in p and p[other].shape != p[name].shape:
                        raise EfftuneError(
                            f"{other} {tuple(p[other].shape)} is not one for each of {len(p[name])} {name}."
                        )

    def put(self, c):
        indices, original, values, left, _, left_values = c.p
        c.base.put(c.w, left, left_values)
        c.base.put(c.w, indices, original + self.change_of(original, values))

    def take_back(self, c):
        indices, original, _, left, left_original, _ = c.p
        c.base.put(c.w, left, left_original)
        c.base.put(c.w, indices, original)

    def forward(self, c, x):
        return c.linear(x), c.save(x, c.source) if c.need.p[2] else ()

    def backward(self, c, dy, saved, add=None):
        dx = c.linear_t(dy, add=add) if c.need.x else add
        dvalues = entries_grad(*c.operands(dy, saved), c.p[0]).to(c.p[2].dtype) if c.need.p[2] else None
        return dx, c.no_dw(), (None, None, dvalues, None, None, None)
