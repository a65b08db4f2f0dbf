"""DoRA as PEFT users know it, over any stored base."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.delta.dora import DoRA
from efftune.methods.adapters._adapter import LowRank


@dataclass(frozen=True)
class DoraMethod(LowRank):
    """Adapts each frozen linear layer as `lora` does and trains the length of each row of its weight besides: A and B
    turn the rows, and a magnitude sets how long they are.

    y = g ∘ (x·(W + scale·B·A)ᵀ) + bias with g = m / ‖W + scale·B·A‖ by row; see `efftune.linear.delta.dora.DoRA`.

    Args: those of `lora`, with the same meaning (PEFT's LoraConfig with use_dora=True).
    Source: Liu et al. 2024, arXiv:2402.09353.
    """

    name = "dora"

    def delta(self) -> DoRA:
        return DoRA(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.freeze_a, self.dtype)
