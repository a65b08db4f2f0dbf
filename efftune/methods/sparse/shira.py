"""SHiRA: a sparse high-rank adapter."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.delta.entries import Entries
from efftune.methods.sparse._sparse import Sparse


@dataclass(frozen=True)
class Shira(Sparse):
    """Trains a few entries of each linear layer's weight, picked once, and nothing else of it.

    `efftune.linear.delta.entries.Entries` says how they are computed and what backward keeps.

    Args:
        density: the share of a weight's entries that train.   r: in its place as many as a LoRA of rank r has,
            r·(N + K), which is how PEFT's ShiraConfig says it.
        scorer: which ones: "random" (PEFT's), "magnitude" (the largest), "small" (the smallest), or "low_rank" (the
            largest of the weight's approximation of rank `rank`).
        seed: of random picks, and of the approximation.   target_modules, modules_to_save: see `lora`.
    Source: Bhardwaj et al. 2024, arXiv:2406.13175.
    """

    scorer: str = "random"
    r: int | None = None

    name = "shira"

    def delta(self):
        return Entries(self.density, self.r)
