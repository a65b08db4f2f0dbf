"""NoDelta: nothing is trained; the layer only passes gradients through."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.contracts import Delta


@dataclass(frozen=True)
class NoDelta(Delta):
    """y = x·Wᵀ + bias with W frozen. Saved for backward: nothing. For a base that nn.Linear cannot hold; a frozen dense
    layer is faster as nn.Linear."""

    trains = False

    def needs_keep(self):
        return False

    def forward(self, base, keep, x, bias, w, p, seed, need, source):
        return base.linear(w, x, bias=bias), ()

    def backward(self, base, keep, dy, w, p, saved, seed, need):
        return base.linear_t(w, dy) if need.x else None, (None,) * len(w), ()
