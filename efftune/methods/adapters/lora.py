"""LoRA as PEFT users know it, over any stored base."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear import LoRA
from efftune.methods.adapters._adapter import LowRank


@dataclass(frozen=True)
class LoraMethod(LowRank):
    """Trains a low-rank term beside the frozen weight of each linear layer that `target_modules` selects:
    y = x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ.

    `efftune.linear.LoRA` says how it is computed, what is rounded and what backward keeps.

    Args (names and meanings are those of PEFT's LoraConfig where it has them):
        r, lora_alpha, lora_dropout, use_rslora, freeze_a, dtype: see `efftune.linear.LoRA`.
        target_modules: a regular expression, a list of path endings, or "all-linear" (all but the output head).
        bias: which biases train: "none", "lora_only" (those of the layers with adapters) or "all".
        modules_to_save: path endings of modules that train whole beside the adapters. None selects a classification
            head, which is new in a model made from an encoder.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    name = "lora"

    def delta(self) -> LoRA:
        return LoRA(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.freeze_a, self.dtype)
