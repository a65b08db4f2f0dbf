"""Factored: LoRA whose A and B are functions of what trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from efftune.errors import EfftuneError
from efftune.linear.contracts import Call, Gradients, Tensors
from efftune.linear.delta.lora import LoRA


@dataclass(frozen=True)
class Factored(LoRA, ABC):
    """y = x·Wᵀ + s·drop(x)·(B·A)ᵀ - s·x·(B₀·A₀)ᵀ, with A and B = factors(p) of what trains, and W frozen.

    A kind of this sort says `names`, `learns`, how p begins, and `factors`. One whose B·A is not zero at the start, or
    that takes a part of W away, says `taken` as well: W itself is never written to, so that it can be shared, and an
    adapter fits the base model that everybody has. That pair is beside the dropout, not under it: it is as fixed as W.

    Numerics: as `LoRA`; A and B are computed in the dtype of p, then rounded to x.dtype, and so are their gradients,
        which go back through `factors` in the dtype of p. All terms of y, and of dx, are added in one epilogue.
    Saved for backward: what `LoRA` saves. A and B are made again.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.freeze_a:
            raise EfftuneError(f"the A of {type(self).__name__} is made from what trains; leave freeze_a.")

    @abstractmethod
    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """A (R, K) and B (N, R), by operations that torch differentiates."""

    def taken(self, p: Tensors) -> tuple[Tensor, Tensor] | None:
        """A₀ (R₀, K) and B₀ (N, R₀), which do not train, or None."""
        return None

    def forward(self, c, x):
        return super().forward(self._call(c, x.dtype, self.factors(c.p)), x)

    def backward(self, c, dy, saved, add=None):
        ab, pull = vjp(self.factors, c.p, c.need.p)
        dx, dws, dab = super().backward(self._call(c, dy.dtype, ab), dy, saved)
        return dx if add is None else add.add_(dx), dws, pull(dab)

    def _call(self, c: Call, dtype: torch.dtype, ab: Tensors) -> Call:
        inner = c._replace(p=ab, need=c.need._replace(p=(any(c.need.p),) * 2))
        pair = self.taken(c.p)
        if pair is None:
            return inner
        less = _Less(*inner)
        less.pair = pair[0].to(dtype), (-self.scale * pair[1]).to(dtype)
        return less

    def weight(self, c, a, b, dtype):
        ab, pair = self.factors(c.p), self.taken(c.p)
        if pair is not None:
            ab = torch.cat([ab[0], pair[0]]), torch.cat([ab[1], -pair[1]], 1)
        return super().weight(c._replace(p=ab), a, b, dtype)


class _Less(Call):
    """The call of a layer that adds a fixed low-rank pair, in the epilogue of each product."""

    pair: tuple[Tensor, Tensor]  # (R, K), (N, R)

    def linear(self, x, low_rank=None, add=None, entries=()):
        a, b = self.pair
        return super().linear(x, _joined(low_rank, x @ a.t(), b, 1), add, entries)

    def linear_t(self, dy, low_rank=None, add=None, entries=()):
        a, b = self.pair
        return super().linear_t(dy, _joined(low_rank, dy @ b, a, 0), add, entries)


def _joined(low_rank: tuple[Tensor, Tensor] | None, h: Tensor, factor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return (h, factor) if low_rank is None else (torch.cat([low_rank[0], h], 1), torch.cat([low_rank[1], factor], dim))


def vjp(function: Callable[[Tensors], Any], p: Tensors, need: tuple[bool, ...]) -> tuple[Any, Callable[..., Gradients]]:
    """function(p), and what makes of its gradient those of the tensors of p that are needed (None of the others)."""
    live = [i for i, needed in enumerate(need) if needed]

    def of(*given: Tensor):
        parts = dict(zip(live, given, strict=True))
        return function(tuple([parts.get(i, t) for i, t in enumerate(p)]))

    if not live:
        return function(p), lambda d: (None,) * len(p)
    value, pull = cast(tuple, torch.func.vjp(of, *[p[i] for i in live]))

    def gradients(d) -> Gradients:
        d = tree_map(lambda d, t: d.to(t.dtype), d, value)
        parts = dict(zip(live, pull(d), strict=True))
        return tuple([parts.get(i) for i in range(len(p))])

    return value, gradients
