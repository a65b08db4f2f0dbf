"""int8: frozen weights stored as 8-bit integers with a scale per group."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.linear import Int8
from efftune.methods._base import STORES, Method
from efftune.plan import ALL_LINEAR


@dataclass(frozen=True)
class Int8Method(Method):
    """Stores the weights of the linear layers that `target_modules` selects as 8-bit integers with a scale for each
    `group` of a row, about 1 byte a weight (1.03 for bfloat16 and a group of 64).

    The method says nothing about what trains: "int8 + lora(r=16)" trains adapters over the integers.
    `efftune.linear.Int8` says how they are rounded and multiplied.

    Raises: EfftuneError where a layer's weight is tied to another module's, trains itself, or is not finite.
    """

    group: int = 64
    target_modules: str | tuple[str, ...] = ALL_LINEAR

    name = "int8"
    phase = STORES

    def __post_init__(self):
        Int8(self.group)  # raises on a value out of range

    def plan(self, plan):
        base = Int8(self.group)
        layers = plan.targets(self, self.target_modules, base)
        for layer in layers:
            weight = layer.parameters.get("weight")  # integers have none
            if weight is not None and (others := plan.tied(weight)):
                raise EfftuneError(
                    f"{layer.name} shares its weight with {' and '.join(others)}, and integers would untie them; "
                    "leave it out of int8's target_modules."
                )
        plan.wish(self, layers, base=base)
