"""PEQA: the scales of integer weights train, the integers stay."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.linear import Dense, Trained
from efftune.methods._base import ALL_LINEAR, Method, swap, target_layers


@dataclass(frozen=True)
class Peqa(Method):
    """Trains the scales of the quantised layers that `target_modules` means: "int8(group=64) + peqa" trains a 64th of
    the weights, and what comes out is a model quantised as before, with no adapter beside it.

    Saved for backward: what each layer's keep says (its input). Gradients and optimizer state: of the scales alone. The
    scales have the weights' dtype: in 16 bits small updates are lost with AdamW, and not with mezo, whose ε should be a
    hundredth of the scales (absmax/127 of their group), since 1e-3 is as large as they are.
    Raises: EfftuneError where a layer is not quantised.
    Source: Kim et al. 2023, arXiv:2305.14152 (one scale for each row; here for each group).
    """

    target_modules: str | tuple[str, ...] = ALL_LINEAR

    name = "peqa"
    trains = True

    def prepare(self, model):
        names = target_layers(self, model, self.target_modules)
        for name in names:
            base = getattr(model.get_submodule(name), "base", Dense())
            if base.trains:
                raise EfftuneError(
                    f"{name}: the scales of integer weights train, and {base} has none; put int8 in front."
                )
        swap(model, names, delta=Trained())
