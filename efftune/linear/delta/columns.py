"""Columns: a few columns of W train, in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear.contracts import Call, Delta
from efftune.linear.handle import Source
from efftune.ops.entries_grad import check_indices


@dataclass(frozen=True)
class Columns(Delta):
    """y = x·Wᵀ + bias, where W[:, S] = round(original + values) for the columns S that were picked, and W elsewhere.

    W holds what is trained, as with `Entries`, so that forward and dx are the plain products, and of x only the columns
    S are needed for a gradient.

    Args:
        count: |S|, at least 1 and at most K.
    Shapes: `columns` (S,) int32, sorted; `original` (N, S) in W's dtype; `values` (N, S) float32 (over a float64 W:
        float64).
    Gradients: x, values (and the bias, if it trains); dvalues = dyᵀ·x̃[:, S].
    Numerics: as a weight gradient of `Trained`, accumulated in float32 and rounded to x.dtype; W is rounded once.
    Saved for backward: keep(x[:, S]), and only if values trains: M·|S| elements, and none where backward can make x
        again from tensors that it holds anyway.
    Raises: EfftuneError for a count out of range, and for columns that are not sorted, within W and distinct.
    Source: Yang et al. 2024, arXiv:2412.06289 (S²FT), which permutes the model so that the columns lie side by side.
    """

    count: int

    names = ("columns", "original", "values")
    learns = wide = ("values",)

    def __post_init__(self):
        if self.count < 1:
            raise EfftuneError(f"at least one column trains, not {self.count}.")

    def why_not(self, base, keep, shape):
        if self.count > shape[1]:
            return f"the layer has {shape[1]} inputs, of which {self.count} cannot train; choose fewer columns"
        return None

    def beside(self) -> Columns:
        """The same over a weight that cannot be written to: it is quantised, or others read it."""
        return AddedColumns(self.count)

    def begin(self, weight):
        # Which columns train is for the recipe to say, by `choose`; the first ones stand for them until then.
        columns = torch.arange(self.count, dtype=torch.int32, device=weight.device)
        original = weight[:, : self.count].clone(memory_format=torch.contiguous_format)
        return weight, (columns, original, torch.zeros_like(original, dtype=above(weight.dtype)))

    def refuse(self, p, shape):
        if "columns" in p and not p["columns"].is_meta:
            check_indices(p["columns"], (1, shape[1]))

    def put(self, c):
        columns, original, values = c.p
        self._write(c, columns, original + values)

    def take_back(self, c):
        self._write(c, *c.p[:2])

    @staticmethod
    def _write(c, columns: Tensor, values: Tensor) -> None:
        n, k = c.w.shape
        first = torch.arange(0, n * k, k, device=columns.device)
        c.base.put(c.w, (first[:, None] + columns).reshape(-1), values.reshape(-1))

    def forward(self, c, x):
        if not c.need.p[2]:
            return c.linear(x), ()
        return c.linear(x), c.save(x.index_select(1, c.p[0]), self._source(c))

    @staticmethod
    def _source(c: Call) -> Source | None:
        """What is known of x[:, S]."""
        if c.source is None:
            return None
        handle = c.source.handle
        return Source(None if handle is None else handle.columns(c.p[0]), scores=c.source.scores)

    def backward(self, c, dy, saved, add=None):
        dx = c.linear_t(dy, add=add) if c.need.x else add
        dvalues = c.weight_grad(dy, saved).to(c.p[2].dtype) if c.need.p[2] else None
        return dx, c.no_dw(), (None, None, dvalues)


@dataclass(frozen=True)
class AddedColumns(Columns):
    """y = x·Wᵀ + x[:, S]·valuesᵀ + bias: `Columns` over a weight that is never written to, since it is quantised, or
    since others read it.

    Args, Gradients, Raises, Source: as `Columns`.
    Shapes: `columns` (S,) int32, sorted; `values` (N, S) float32 (over a float64 W: float64).
    Numerics: values are rounded to x.dtype; their product is added in the epilogue of x·Wᵀ, see `ops.lowrank_linear`.
        Their part of dx is rounded to x.dtype before it is added.
    Saved for backward: keep(x[:, S]), and only if values trains.
    """

    names = ("columns", "values")

    put, take_back = Delta.put, Delta.take_back

    def begin(self, weight):
        weight, (columns, _, values) = super().begin(weight)
        return weight, (columns, values)

    def forward(self, c, x):
        columns, values = c.p
        picked = x.index_select(1, columns)
        y = c.linear(x, (picked, values.to(x.dtype)))
        return y, c.save(picked, self._source(c)) if c.need.p[1] else ()

    def backward(self, c, dy, saved, add=None):
        columns, values = c.p
        dx = c.linear_t(dy, add=add).index_add_(1, columns, dy @ values.to(dy.dtype)) if c.need.x else add
        dvalues = c.weight_grad(dy, saved).to(values.dtype) if c.need.p[1] else None
        return dx, c.no_dw(), (None, dvalues)

    def weight(self, c, a, b, dtype):
        columns, values = c.p
        rows = c.base.rows(c.w, a, b, torch.promote_types(dtype, values.dtype))
        return rows.index_add(1, columns, values[a:b].to(rows.dtype)).to(dtype)


def above(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
