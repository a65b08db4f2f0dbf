"""Recompute: blocks keep their inputs only and run again in backward."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.methods._base import Method


@dataclass(frozen=True)
class RecomputeBlocks(Method):
    """Lets every `every`-th block of the transformer's stack keep its inputs only, and runs it again in backward
    (checkpointing).

    The gradient is the same, bit for bit. It composes with everything inside the block: while a block runs again, its
    layers keep what they keep for that block alone.

    Memory: a block's inputs, 2 d bytes a token in 16 bits.
    Cost: one more forward of the block, a third of a step.
    Raises: EfftuneError for an `every` below 1, and where the model has no stack of alike blocks.
    Source: Chen et al. 2016, arXiv:1604.06174.
    """

    every: int = 1

    name = "recompute"

    def __post_init__(self):
        if self.every < 1:
            raise EfftuneError(f"recompute runs every n-th block again, n at least 1, not {self.every}.")

    def plan(self, plan):
        plan.run_again(self, plan.blocks()[1][:: self.every])
