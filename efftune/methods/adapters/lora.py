"""LoRA as PEFT users know it, over any stored base."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.linear import LoRA
from efftune.methods._base import TRAINS, Method
from efftune.plan import ALL_LINEAR
from efftune.structure import CLASSIFIERS, matches


@dataclass(frozen=True)
class LoraMethod(Method):
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

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    bias: str = "none"
    use_rslora: bool = False
    freeze_a: bool = False
    modules_to_save: tuple[str, ...] | None = None
    dtype: str | None = "float32"

    name = "lora"
    phase = TRAINS

    def __post_init__(self):
        self.delta()  # raises on a value out of range
        if self.bias not in ("none", "lora_only", "all"):
            raise EfftuneError(f"lora's bias is 'none', 'lora_only' or 'all', not {self.bias!r}.")

    def delta(self) -> LoRA:
        return LoRA(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.freeze_a, self.dtype)

    def plan(self, plan):
        model = plan.model
        wholly = CLASSIFIERS if self.modules_to_save is None else self.modules_to_save
        saved = [name for name, _ in model.named_modules() if wholly and matches(name, wholly)]
        for missing in self.modules_to_save or ():
            if not any(matches(name, (missing,)) for name in saved):
                raise EfftuneError(f"modules_to_save names {missing!r}, which is no module of {type(model).__name__}.")
        inside = {layer.name for name in saved for layer in plan.inside(name)}
        targets = [layer for layer in plan.targets(self, self.target_modules) if layer.name not in inside]
        plan.wish(self, targets, delta=self.delta())
        plan.train_modules(self, saved)
        if self.bias == "lora_only":
            plan.train(self, [layer.parameters["bias"] for layer in targets if "bias" in layer.parameters])
        elif self.bias == "all":
            plan.train(self, [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"])
