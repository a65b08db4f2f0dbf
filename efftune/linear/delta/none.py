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

    def forward(self, c, x):
        return c.linear(x), ()

    def backward(self, c, dy, saved, add=None):
        return c.linear_t(dy, add=add) if c.need.x else None, c.no_dw(), ()
