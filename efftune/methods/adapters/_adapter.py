"""What low-rank adapters share: their settings, and the biases that train beside them."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.linear.contracts import Delta
from efftune.methods._base import TRAINS, Method
from efftune.plan import ALL_LINEAR


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
        targets = plan.adapt(self, self.delta(), self.target_modules, self.modules_to_save)
        if self.bias == "lora_only":
            plan.train(self, [layer.parameters["bias"] for layer in targets if "bias" in layer.parameters])
        elif self.bias == "all":
            plan.train(self, [name for name, _ in plan.model.named_parameters() if name.rpartition(".")[2] == "bias"])
