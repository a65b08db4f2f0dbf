"""What methods share that switch entries of each weight on and off."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.delta.masked import Masked
from efftune.methods._base import ESTIMATES
from efftune.methods.sparse._sparse import Sparse


@dataclass(frozen=True)
class Masks(Sparse):
    """Trains a score for each entry that was picked, once; entries whose score falls to the threshold are off."""

    density: float = 0.1
    threshold: float = 5e-3
    init: float = 1e-2

    of_batch = ()  # masks are picked before training

    def why_not(self, others):
        without = [m.name for m in others if m.place == ESTIMATES and m.overrides("optimizer")]
        if without:
            return (
                f"masks change the loss in steps, which the differences that {without[0]} takes do not see; use shira, "
                f"or leave {without[0]} out"
            )
        return super().why_not(others)

    def delta(self):
        return Masked(self.density, None, self.threshold, self.init)
