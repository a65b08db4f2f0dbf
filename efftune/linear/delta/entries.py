"""Entries: a few entries of W train, in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear.contracts import Call, Delta, SparseMatrix, add_entries
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
    wide = ("values",)

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise EfftuneError(f"the density of entries that train lies in (0, 1], not {self.density}.")
        if self.r is not None and self.r < 1:
            raise EfftuneError(f"r·(N + K) entries need an r of at least 1, not {self.r}.")

    def count(self, shape: tuple[int, int]) -> int:
        """S for a layer of (N, K)."""
        n, k = shape
        return self.r * (n + k) if self.r is not None else round(self.density * n * k)

    def why_not(self, base, keep, shape):
        n, k = shape
        if n * k >= 2**31:
            return f"{n} x {k} entries are too many for indices of 32 bits; train this layer by an adapter"
        if self.count(shape) > n * k:
            return f"r={self.r} asks for more entries, r·(N + K), than the {n} x {k} that there are; choose a smaller r"
        if self.count(shape) < 1:
            return f"density={self.density} is less than one entry of {n} x {k}; use a larger density or other layers"
        return None

    def beside(self) -> Entries:
        """The same over a weight that cannot be written to: it is quantised, or others read it."""
        return AddedEntries(self.density, self.r)

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


@dataclass(frozen=True)
class AddedEntries(Entries):
    """y = x·(W + S)ᵀ + bias, where S[i] = values[i] at the entries i that were picked, and 0 elsewhere: `Entries` over
    a weight that is never written to, since it is quantised, or since others read it.

    Args, Gradients, Raises, Source: as `Entries`.
    Shapes: `indices` (S,) int32, sorted; `values` (S,) float32 (over a float64 W: float64); `left`, `left_values` (L,)
        of those that left the picks and stay what they became, dtype of `values`.
    Numerics: where the base unpacks W, S is added to it, rounded to x.dtype once; else x·Sᵀ is added to y, and dy·S to
        dx, which are rounded to x.dtype before and after.
    Saved for backward: keep(x), and only if values trains.
    """

    names = ("indices", "values", "left", "left_values")
    resizes = names
    wide = ("values", "left_values")

    put, take_back = Delta.put, Delta.take_back

    def begin(self, weight):
        weight, (indices, _, values, left, _, _) = super().begin(weight)
        return weight, (indices, values, left, values[:0].clone())

    @staticmethod
    def _added(c: Call, dtype: torch.dtype) -> SparseMatrix:
        """S, for products in dtype."""
        indices, values, left, left_values = c.p
        wide = torch.promote_types(dtype, torch.float32)
        picked = indices, values.detach().to(wide)
        return (picked, (left, left_values.to(wide))) if len(left) else (picked,)

    def forward(self, c, x):
        return c.linear(x, entries=self._added(c, x.dtype)), c.save(x, c.source) if c.need.p[1] else ()

    def backward(self, c, dy, saved, add=None):
        dx = c.linear_t(dy, add=add, entries=self._added(c, dy.dtype)) if c.need.x else add
        if not c.need.p[1]:
            return dx, c.no_dw(), (None,) * 4
        g, z = c.operands(dy, saved)
        return dx, c.no_dw(), (None, entries_grad(g, z, c.p[0]).to(c.p[1].dtype), None, None)

    def weight(self, c, a, b, dtype):
        k, wide = c.w.shape[1], torch.promote_types(dtype, c.p[1].dtype)
        rows = c.base.rows(c.w, a, b, wide).contiguous()
        rows = rows.clone() if rows.dtype == c.w.dtype else rows  # it may be W itself
        inside = [_between(i, v, a * k, b * k) for i, v in self._added(c, wide)]
        return add_entries(rows, inside).to(dtype)


def _between(indices: Tensor, values: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """The entries first..last, counted from the first."""
    a, b = torch.searchsorted(indices, indices.new_tensor([first, last])).tolist()
    return indices[a:b] - first, values[a:b]
