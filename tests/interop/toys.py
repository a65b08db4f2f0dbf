"""Two deltas with a method each, for the tables of formats: one that PEFT has as well, and a subclass of LoRA that it
does not have."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from efftune import methods, recipe
from efftune.interop import peft
from efftune.linear import LoRA
from efftune.linear.contracts import Delta
from efftune.methods._base import TRAINS, Method
from efftune.methods.adapters.lora import LoraMethod
from efftune.plan import ALL_LINEAR


@dataclass(frozen=True)
class Hadamard(Delta):
    """W' = W ∘ (1 + B A), as PEFT's HiRA; in evaluation only."""

    r: int = 4
    hira_dropout: float = 0.0

    names = ("hira_a", "hira_b")

    def init(self, shape, dtype, device):
        return nn.init.kaiming_uniform_(torch.empty(self.r, shape[1])), torch.zeros(shape[0], self.r)

    def forward(self, c, x):
        y = x @ self.weight(c, 0, c.w.shape[0], x.dtype).t()
        return y if c.bias is None else y + c.bias, ()

    def weight(self, c, a, b, dtype):
        return c.base.rows(c.w, a, b, dtype) * (1 + c.p[1][a:b] @ c.p[0])


@dataclass(frozen=True)
class Magnitude(LoRA):
    """W' = m ∘ (W + sBA) / ‖W + sBA‖ by row, as PEFT's LoRA with use_dora; in evaluation only."""

    names = ("lora_a", "lora_b", "magnitude", "began")  # began: m as it began, for which PEFT has no name
    learns = names[:3]

    def begin(self, weight):
        a, b = self.init(weight.shape, weight.dtype, weight.device)
        return weight, (a, b, weight.norm(dim=1), weight.norm(dim=1))

    def forward(self, c, x):
        y = x @ self.weight(c, 0, c.w.shape[0], x.dtype).t()
        return y if c.bias is None else y + c.bias, ()

    def weight(self, c, a, b, dtype):
        plain = super().weight(c._replace(p=c.p[:2]), a, b, dtype)
        return plain * (c.p[2][a:b] / plain.norm(dim=1))[:, None].to(dtype)


@dataclass(frozen=True)
class HadamardMethod(Method):
    """`Hadamard` on the layers that `target_modules` means."""

    r: int = 4
    hira_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()

    name = "hadamard"
    phase = TRAINS

    def plan(self, plan):
        plan.wish(self, plan.targets(self, self.target_modules), delta=Hadamard(self.r, self.hira_dropout))
        named = [n for n, _ in plan.model.named_modules() if n in self.modules_to_save]
        plan.train_modules(self, named)


@dataclass(frozen=True)
class MagnitudeMethod(LoraMethod):
    """`Magnitude` on the layers that `target_modules` means."""

    name = "magnitude"

    def delta(self):
        return Magnitude(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.freeze_a, self.dtype)


HADAMARD = peft.Kind(
    delta=Hadamard,
    method=HadamardMethod,
    peft_type="HIRA",
    keys={"hira_a": "hira_A", "hira_b": "hira_B"},
    fields={"r": ("r", 32), "hira_dropout": ("hira_dropout", 0.0)},
)
MAGNITUDE = replace(
    peft.LORA,
    delta=Magnitude,
    method=MagnitudeMethod,
    keys={**peft.LORA.keys, "magnitude": "lora_magnitude_vector"},
    settings={"use_dora": True},
)


def register(monkeypatch, carried=True):
    """Makes recipes know both methods, and the table both kinds where they are to be carried."""
    known = {**methods.available(), "hadamard": HadamardMethod, "magnitude": MagnitudeMethod}
    monkeypatch.setattr(recipe, "available", lambda: known)
    monkeypatch.setattr(peft, "KINDS", [*peft.KINDS, HADAMARD, MAGNITUDE] if carried else peft.KINDS)
