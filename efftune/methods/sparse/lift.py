"""LIFT: the principal weights train, those that are large in a low-rank approximation."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.methods.sparse._sparse import Sparse


@dataclass(frozen=True)
class Lift(Sparse):
    """Trains the entries of each linear layer's weight that are largest in its low-rank approximation, and picks them
    anew every `every` steps.

    Entries that leave the picks stay as they were trained. Those that stay picked keep their optimizer state, and new
    ones begin with none.

    Args:
        density: the share of a weight's entries that train.   rank: of the approximation.
        every: steps between picks; 0: they are picked once.
        scorer: another one than "low_rank": see `shira`.   seed: of the approximation.
        target_modules, modules_to_save: see `lora`.
    Source: Liu et al. 2025, arXiv:2506.00772. The code published with it picks the smallest entries unless a mask's
        name says "largest", r·(N + K) of them, lets weight decay act on W, and corrects new entries for the age of the
        others, so that their first step is 3.2 times too long.
    """

    density: float = 0.05
    scorer: str = "low_rank"
    every: int = 200

    name = "lift"

    def __post_init__(self):
        super().__post_init__()
        if self.every < 0:
            raise EfftuneError(f"entries are picked anew every so many steps, not every={self.every}; 0 means never.")

    @property
    def picks_again(self):
        return self.every > 0

    def is_due(self, step):
        return step == 0 or (self.every > 0 and step % self.every == 0)
