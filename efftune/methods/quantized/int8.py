"""int8: frozen weights stored as 8-bit integers with a scale per group."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.linear import Int8, Linear
from efftune.methods._base import ALL_LINEAR, Method, shared_parameters, swap, target_layers


@dataclass(frozen=True)
class Int8Method(Method):
    """Stores the layers that `target_modules` means as `efftune.linear.Int8(group)`: about 1 byte per weight.

    Says nothing about what trains: "int8 + lora(r=16)" trains adapters over the integers.
    Raises: EfftuneError where a layer's weight is tied to another module's, or trains itself.
    """

    group: int = 64
    target_modules: str | tuple[str, ...] = ALL_LINEAR

    name = "int8"

    def __post_init__(self):
        Int8(self.group)  # raises on a value out of range

    def prepare(self, model):
        tied = shared_parameters(model)
        for name, layer in target_layers(self, model, self.target_modules).items():
            weight = None if isinstance(layer, Linear) else layer.weight
            others = [n for n in tied.get(id(weight), ()) if n != f"{name}.weight"]
            if others:
                raise EfftuneError(
                    f"{name} shares its weight with {' and '.join(others)}, and integers would untie them; "
                    "leave it out of int8's target_modules."
                )
            swap(model, name, base=Int8(self.group))
