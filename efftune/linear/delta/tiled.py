"""Tiled: ΔW is an expression that is computed a tile of rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from efftune.linear.contracts import Base, Call, Delta, Gradients, Tensors, product_t
from efftune.linear.delta.factored import vjp
from efftune.linear.delta.lora import DROPOUT_STREAM, _dropped
from efftune.ops.dropout import dropout

TILE = 2**22  # entries of ΔW at once


@dataclass(frozen=True)
class Tiled(Delta, ABC):
    """y = x·Wᵀ + drop(x)·ΔWᵀ + bias, with ΔW a function of p, and of W, that can give some rows of it; W is frozen.

    A kind of this sort says `names`, how p begins, and `tile`. The gradient dΔW = dyᵀ·z̃ exists a tile of rows at a
    time as well, and goes back through `tile`; z̃ is made again once for all of them.

    Numerics: `tile` computes in f32 or wider, whatever the dtype of p, and ΔW and dΔW are rounded to x.dtype; so is y
        before and after ΔW's term, and dx's part of ΔW after each tile. The gradients of p are summed in f32. In f32
        and f64, without dropout, x is multiplied by W + ΔW.
    Saved for backward: keep(x), with dropout the seed besides. ΔW is made again.
    Time: three products of the size of a frozen layer's two in f32, five in 16 bits and under dropout.
    """

    of_weight: ClassVar[bool] = False  # whether `tile` asks for W

    @property
    def drop(self) -> float:
        """The probability of dropout for the input that ΔW is multiplied by."""
        return 0.0

    @property
    def random(self) -> bool:
        return self.drop > 0

    @abstractmethod
    def tile(self, p: Tensors, a: int, b: int, w: Any) -> Tensor:
        """ΔW[a:b] (b - a, K) of p and, if `of_weight`, of the tensor w = W[a:b], all in one dtype, by operations that
        torch differentiates."""

    def forward(self, c, x):
        z, source = x, c.source
        if self.drop:
            assert c.seed is not None  # what draws gets one
            z = dropout(x, self.drop, c.seed, DROPOUT_STREAM)
            source = None if source is None else _dropped(x, source, self.drop, c.seed)
        p, whole = _wide(c), self._whole(c, x)
        y = _bias(c, x) if whole else c.linear(x)
        for a, b in _tiles(c):
            w = self._rows(c, a, b, p, whole)
            rows = self._tile(p, a, b, w)
            y[:, a:b].addmm_(z, (rows + w if whole else rows).to(x.dtype).t())
        return y, c.save(z, source) if any(c.need.p) else ()

    def backward(self, c, dy, saved, add=None):
        pair = c.operands(dy, saved) if any(c.need.p) else None
        p, whole = _wide(c), self._whole(c, dy)
        dz: Any = None
        dps: Gradients | None = None
        for a, b in _tiles(c):
            w = self._rows(c, a, b, p, whole)
            rows, pull = vjp(lambda p, a=a, b=b, w=w: self._tile(p, a, b, w), p, c.need.p)
            if pair is not None:
                parts = pull(product_t(pair[0][:, a:b], pair[1]))
                dps = parts if dps is None else _sum(dps, parts)
            if c.need.x:
                rows = (rows + w if whole else rows).to(dy.dtype)
                dz = torch.mm(dy[:, a:b], rows) if dz is None else dz.addmm_(dy[:, a:b], rows)
        dx = dz
        if c.need.x:
            if self.drop:
                assert c.seed is not None
                dz = dropout(dz, self.drop, c.seed, DROPOUT_STREAM)
            if add is not None:
                dz = add.add_(dz)
            dx = dz if whole else c.linear_t(dy, add=dz)
        return dx, c.no_dw(), dps or (None,) * len(p)

    def weight(self, c, a, b, dtype):
        p = _wide(c)
        w = self._rows(c, a, b, p, True)
        return (w + self._tile(p, a, b, w)).to(dtype)

    def _whole(self, c: Call, x: Tensor) -> bool:
        """Whether x is multiplied by W + ΔW, once. In 16 bits it is not: their sum would lose what is small in ΔW."""
        return not self.drop and x.dtype.itemsize > 2 and type(c.base).enter is Base.enter

    def _tile(self, p: Tensors, a: int, b: int, w: Tensor | None) -> Tensor:
        return self.tile(p, a, b, w if self.of_weight else None)

    def _rows(self, c: Call, a: int, b: int, p: Tensors, needed: bool) -> Any:
        return c.base.rows(c.w, a, b, p[0].dtype) if needed or self.of_weight else None


def _bias(c: Call, x: Tensor) -> Tensor:
    shape = x.shape[0], c.w.shape[0]
    return x.new_zeros(shape) if c.bias is None else c.bias.repeat(shape[0], 1)


def _tiles(c: Call) -> Iterator[tuple[int, int]]:
    n, k = c.w.shape
    step = max(1, TILE // k)
    return ((a, min(a + step, n)) for a in range(0, n, step))


def _wide(c: Call) -> Tensors:
    dtype = torch.promote_types(torch.promote_types(c.w.dtype, c.p[0].dtype), torch.float32)
    return tuple([t.to(dtype) if t.is_floating_point() else t for t in c.p])


def _sum(sums: Gradients, parts: Gradients) -> Gradients:
    return tuple([None if s is None or d is None else s.add_(d) for s, d in zip(sums, parts, strict=True)])
