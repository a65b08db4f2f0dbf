"""PEQA: the scales of integer weights train, the integers stay."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.linear import Trained
from efftune.methods._base import TRAINS, Method
from efftune.plan import ALL_LINEAR


@dataclass(frozen=True)
class Peqa(Method):
    """Trains the scales of the quantised layers that `target_modules` selects, and leaves their integers as they are.

    "int8(group=64) + peqa" trains one number for every 64 weights. What comes out is a model that is quantised as
    before, with no adapter beside it.

    Saved for backward: what the keep of each layer says, which is its input.
    Memory: gradients and optimizer state are those of the scales alone.
    Numerics: the scales have the weights' dtype. In 16 bits AdamW loses small updates, and mezo does not. The ε of mezo
        should be a hundredth of the scales (absmax/127 of their group), since 1e-3 is as large as they are.
    Raises: EfftuneError where a layer is not quantised.
    Source: Kim et al. 2023, arXiv:2305.14152, which has one scale for each row; here each group has one.
    """

    target_modules: str | tuple[str, ...] = ALL_LINEAR

    name = "peqa"
    phase = TRAINS

    def plan(self, plan):
        layers = plan.targets(self, self.target_modules)
        for layer in layers:
            if layer.base.trains:
                raise EfftuneError(
                    f"{layer.name}: the scales of integer weights train, and {layer.base} has none; add int8 to the "
                    "recipe."
                )
        plan.wish(self, layers, delta=Trained())
