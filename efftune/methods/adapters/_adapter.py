"""What adapters share: the layers that they mean, what trains whole beside them, and the settings of low-rank ones."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.linear.contracts import Delta
from efftune.methods._base import TRAINS, Method
from efftune.plan import ALL_LINEAR, Layer, Plan
from efftune.structure import CLASSIFIERS, matches


def adapt(
    method: Method,
    plan: Plan,
    delta: Delta,
    target_modules: str | tuple[str, ...],
    modules_to_save: tuple[str, ...] | None,
) -> list[Layer]:
    """Wishes `delta` for the layers that `target_modules` selects, and returns them. The modules that `modules_to_save`
    selects train whole; None means a classification head.

    Raises: EfftuneError where either selects nothing.
    """
    model = plan.model
    wholly = CLASSIFIERS if modules_to_save is None else modules_to_save
    saved = [name for name, _ in model.named_modules() if wholly and matches(name, wholly)]
    for missing in modules_to_save or ():
        if not any(matches(name, (missing,)) for name in saved):
            raise EfftuneError(f"modules_to_save names {missing!r}, which is no module of {type(model).__name__}.")
    inside = {layer.name for name in saved for layer in plan.inside(name)}
    targets = [layer for layer in plan.targets(method, target_modules) if layer.name not in inside]
    plan.wish(method, targets, delta=delta)
    plan.train_modules(method, saved)
    return targets


@dataclass(frozen=True)
class LowRank(Method):
    """LoRA and what derives from it share these settings; `lora` says what each of them does."""

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    bias: str = "none"
    use_rslora: bool = False
    freeze_a: bool = False
    modules_to_save: tuple[str, ...] | None = None
    dtype: str | None = "float32"

    phase = TRAINS

    def __post_init__(self):
        self.delta()  # raises on a value out of range
        if self.bias not in ("none", "lora_only", "all"):
            raise EfftuneError(f"{self.name}'s bias is 'none', 'lora_only' or 'all', not {self.bias!r}.")

    def delta(self) -> Delta:
        raise NotImplementedError

    def plan(self, plan):
        targets = adapt(self, plan, self.delta(), self.target_modules, self.modules_to_save)
        if self.bias == "lora_only":
            plan.train(self, [layer.parameters["bias"] for layer in targets if "bias" in layer.parameters])
        elif self.bias == "all":
            plan.train(self, [name for name, _ in plan.model.named_parameters() if name.rpartition(".")[2] == "bias"])
