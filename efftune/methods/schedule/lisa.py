"""LISA: a few layers train at a time, redrawn every few steps."""

from __future__ import annotations

import random
from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.methods._base import Method
from efftune.structure import blocks


@dataclass(frozen=True)
class Lisa(Method):
    """Trains only `layers` of the stack of transformer layers at a time, and draws them anew every `interval` steps.

    Of what the recipe trains, everything outside the stack (embeddings, head, final norm) always trains. Layers are
    drawn without replacement, and the draw follows from (seed, step // interval) alone, so a resumed run repeats it.
    All parameters are in the optimizer from the start. A layer that leaves loses its gradient and optimizer state, and
    one that enters starts afresh.

    Memory: gradients and optimizer state of `layers` layers; a frozen layer keeps no input for its weights.
    Source: Pan et al. 2024, arXiv:2403.17919, algorithm 1 (γ = layers = 2, K = interval = 20).
    """

    layers: int = 2
    interval: int = 20
    seed: int = 0

    name = "lisa"

    def __post_init__(self):
        if self.layers < 1 or self.interval < 1:
            raise EfftuneError(f"{self} needs layers and interval of at least 1.")

    def plan(self, plan):
        name, stack = plan.blocks()
        if self.layers > len(stack):
            raise EfftuneError(f"lisa(layers={self.layers}) draws from {name}, which has only {len(stack)} layers.")
        trained = [*plan.parameters, *(f"{layer.name}." for layer in plan.layers.values() if layer.trains)]
        count = sum(any(other.startswith(f"{block}.") for other in trained) for block in stack)
        if self.layers > count:
            raise EfftuneError(
                f"lisa(layers={self.layers}) draws from the blocks of {name} that train, which are {count}; draw "
                "fewer, or let more of them train."
            )

    def drawn(self, count: int, step: int) -> list[int]:
        """The layers of a stack of `count` that train at `step`."""
        return sorted(random.Random(f"{self.seed}:{step // self.interval}").sample(range(count), self.layers))

    def before_step(self, run):
        model, optimizer = run.model, run.optimizer
        name, stack = blocks(model)
        registered = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = [i for i, block in enumerate(stack) if any(id(p) in registered for p in block.parameters())]
        drawn = {f"{name}.{trained[i]}." for i in self.drawn(len(trained), run.step)}
        for full_name, parameter in model.named_parameters():
            if id(parameter) not in registered or not full_name.startswith(name + "."):
                continue
            active = full_name.startswith(tuple(drawn))
            if not active and parameter.requires_grad:
                parameter.grad = None
                optimizer.state.pop(parameter, None)
            parameter.requires_grad_(active)
