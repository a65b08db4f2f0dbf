"""What methods share that may let a micro-batch decide which entries or columns train."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, cast

from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.base.dense import is_matrix
from efftune.linear.contracts import Delta
from efftune.linear.delta.columns import Columns
from efftune.linear.delta.entries import Entries
from efftune.linear.picks import columns_of, entries_of
from efftune.methods import _base
from efftune.methods._base import ESTIMATES, TRAINS, Method, Micro, Run
from efftune.methods.sparse._scores import SCORERS
from efftune.methods.sparse._watch import NotFinite, overflows
from efftune.optim.contract import refuse_move
from efftune.plan import ALL_LINEAR, Layer, Plan
from efftune.structure import matches

GRADIENT, ACTIVATION = "gradient", "activation"  # scorers that need a batch


@dataclass
class State(_base.State):
    picked: dict[str, int] = field(default_factory=dict)  # layer -> the step at which a batch last decided about it


class Picks(Method):
    """Trains a part of each weight, which part is said by a scorer: of the weight, before training, or of what the
    first micro-batch of a step shows, before its backward pass."""

    phase = TRAINS
    State = State

    scorer: str
    rank: int  # of the approximation of a weight, for the scorer that takes one
    target_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...] | None

    of_batch: ClassVar[tuple[str, ...]] = (GRADIENT,)  # scorers beside those of the weight
    of_file: ClassVar[tuple[str, ...]] = ()
    what: ClassVar[str]  # that is picked
    instead: ClassVar[tuple[str, str]]  # what to use where a batch may not decide, and where picks may not change

    def __post_init__(self):
        known = *SCORERS, *self.of_batch, *self.of_file
        if self.scorer not in known:
            raise EfftuneError(f"scorer is one of {', '.join(known)}, not {self.scorer!r}.")
        if self.rank < 1:
            raise EfftuneError(f"the rank of the approximation is at least 1, not {self.rank}.")

    def adapt(self, plan: Plan, delta: Callable[[Layer], Entries | Columns]) -> list[Layer]:
        """Wishes the delta of each of the method's layers, in place where the weight can be written to. Returns them.

        Raises: EfftuneError for layers that the scorer cannot score.
        """

        def fitting(layer: Layer) -> Delta:
            found = delta(layer)
            return found if plan.writable(layer) else found.beside()

        targets = plan.adapt(self, fitting, self.target_modules, self.modules_to_save)
        for layer in targets:
            if self.scorer == "low_rank" and self.rank > min(layer.shape):
                raise EfftuneError(
                    f"{layer.name}: rank={self.rank} exceeds min(N, K) = {min(layer.shape)} of a layer of "
                    f"{layer.shape}; choose a smaller rank or other layers."
                )
            if plan.begins and self.of_weight and layer.plain and not layer.foreign:
                weight = cast(Tensor, plan.model.get_submodule(layer.name).weight)
                if is_matrix(weight) and not weight.is_meta and not _finite(weight):
                    raise EfftuneError(
                        f"{layer.name}: its weight has NaN or Inf, by which {self.what} cannot be picked; look where "
                        "it was loaded from, or choose other layers."
                    )
        return targets

    @property
    def of_weight(self) -> bool:
        """Whether the first ones are picked by the numbers of the weight."""
        return self.scorer in SCORERS and self.scorer != "random"

    @property
    def by_batch(self) -> bool:
        """Whether a micro-batch decides what trains."""
        return self.scorer in self.of_batch

    @property
    def picks_again(self) -> bool:
        """Whether other entries or columns train after the first step."""
        return False

    def why_not(self, others):
        # Activations could be seen without backward, but runs of these methods are replayed from seeds, without data.
        without = [m.name for m in others if m.place == ESTIMATES and m.overrides("optimizer")]
        if self.by_batch and without:
            seen = ACTIVATION if self.scorer == ACTIVATION else GRADIENT
            return (
                f"it picks {self.what} by their {seen}s, and {without[0]} trains without backward; use "
                f"{self.instead[0]}"
            )
        holding = [m.name for m in others if m.overrides("arrives")]
        if (self.by_batch or self.picks_again) and holding:
            return (
                f"other {self.what} train as time goes on, and {holding[0]} compares those of now with those that a "
                f"round began with; use {self.instead[1]}"
            )
        return None

    def layers(self, run: Run) -> dict[str, Linear]:
        """Those that this method trains a part of, by name, whose weights have data."""
        mine = [name for name, layer in run.plan.layers.items() if layer.by.get("delta") == self.name]
        if self.target_modules != ALL_LINEAR:  # else another method of the name has the rest
            mine = [name for name in mine if matches(name, self.target_modules)]
        layers = {name: cast(Linear, run.model.get_submodule(name)) for name in mine}
        return {n: m for n, m in layers.items() if (entries_of(m) or columns_of(m)) and not m.values.is_meta}

    def is_due(self, step: int) -> bool:
        """Whether a part is picked before this step."""
        return step == 0

    def overrides(self, hook):
        # What is picked once, by the weight, leaves nothing to do in a step, which then can be captured.
        idle = not self.by_batch and not self.picks_again and type(self).missed is Picks.missed
        return super().overrides(hook) and not (
            idle and getattr(type(self), hook) in (Picks.backward, Picks.after_step)
        )

    def look(self, micro: Micro) -> None:
        """Picks by this micro-batch."""
        raise NotImplementedError

    def backward(self, micro, inner):
        run = micro.run
        if self.by_batch and self.is_due(run.step):
            layers, picked = self.layers(run), run.state(self).picked
            if any(picked.get(name) != run.step for name in layers):
                try:
                    self.look(micro)
                    picked.update(dict.fromkeys(layers, run.step))
                except NotFinite:
                    if not overflows(micro):
                        raise
        return inner(micro)

    def looked(self, run: Run) -> bool:
        """Whether the first step's micro-batch has been seen."""
        return bool(run.state(self).picked)

    def missed(self, run: Run) -> tuple[str, str] | None:
        """What it does in `backward`, and what becomes of it in a loop that did not call that in the first step."""
        if self.by_batch and not self.looked(run):
            return f"picks {self.what}", "those that it began with go on training"
        return None

    def after_step(self, run):
        layers = self.layers(run) if run.step == 0 else {}
        if layers and (words := self.missed(run)):
            what, then = words
            warnings.warn(
                f"{self.name} {what} in tuner.backward(batch, loss_fn), which this loop does not call: {then}.",
                stacklevel=2,
            )
        if self.picks_again and run.optimizer is not None:
            for layer in layers.values():
                refuse_move(run.optimizer, layer.values)  # now, and not when the first entries move


def _finite(weight: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in weight.split(1024))
