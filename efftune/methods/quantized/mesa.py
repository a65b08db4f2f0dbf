"""Mesa: backward keeps 8- or 4-bit codes of activations."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.keep.quantized import Quantized
from efftune.methods._base import ALL_LINEAR, Method, exact_keeps, keep_in_layers


@dataclass(frozen=True)
class Mesa(Method):
    """What backward keeps is quantised in groups, with stochastic rounding: the inputs of the trained linear layers
    that `target_modules` means, and the inputs of norms, activations and attention in the blocks around them.

    Given dy, a linear layer's gradient stays unbiased, unless its input is an activation made again from codes. There,
    and through norms, activations and attention, gradients have a bias of second order in the rounding error. `efftune
    verify` measures it.
    Memory: bits/8 + 4/group bytes for each value instead of 2 or 4.
    Raises: EfftuneError for other bits than 8 and 4, and where none of the layers trains.
    Source: Pan et al. 2021, arXiv:2111.11124.
    """

    bits: int = 8
    group: int = 64
    target_modules: str | tuple[str, ...] = ALL_LINEAR

    name = "mesa"

    def __post_init__(self):
        Quantized(self.bits, self.group)  # raises on a value out of range

    def prepare(self, model):
        keep_in_layers(self, model, self.target_modules, Quantized(self.bits, self.group))

    def block_keep(self):
        return Quantized(self.bits, self.group)

    def exactly(self, model):
        return exact_keeps(model)
