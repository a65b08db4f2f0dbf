"""HiRA as PEFT users know it, over any stored base."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.delta.hira import HiRA
from efftune.methods._base import TRAINS, Method
from efftune.plan import ALL_LINEAR


@dataclass(frozen=True)
class HiraMethod(Method):
    """Adds to each frozen weight W its product with a low-rank matrix, entry by entry, so that the change has a high
    rank with as few trained numbers as `lora` has.

    y = x·Wᵀ + drop(x)·(W ∘ B·A)ᵀ on the layers that `target_modules` means; see `efftune.linear.delta.hira.HiRA`.

    Args (names, meanings and defaults of PEFT's HiraConfig where it has them):
        r, hira_dropout, dtype: see `efftune.linear.delta.hira.HiRA`.   target_modules, modules_to_save: as in `lora`.
    Source: Huang et al. 2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, ICLR.
    """

    r: int = 32
    hira_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] | None = None
    dtype: str | None = "float32"

    name = "hira"
    phase = TRAINS

    def __post_init__(self):
        self.delta()  # raises on a value out of range

    def delta(self) -> HiRA:
        return HiRA(self.r, self.hira_dropout, self.dtype)

    def plan(self, plan):
        plan.adapt(self, self.delta(), self.target_modules, self.modules_to_save)
