"""What methods share that train a few entries of each weight: which layers, which entries, and when they change."""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass, field

from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.delta.entries import Entries
from efftune.linear.picks import entries_of, repick
from efftune.methods import _base
from efftune.methods._base import ESTIMATES, TRAINS, Method, Micro, Run
from efftune.methods.sparse._scores import SCORERS, Matrix, largest
from efftune.methods.sparse._watch import gradient, gradients
from efftune.optim.contract import move
from efftune.plan import ALL_LINEAR

GRADIENT = "gradient"  # a scorer that needs a batch


@dataclass
class State(_base.State):
    picked: dict[str, int] = field(
        default_factory=dict
    )  # layer -> the step at which a gradient last picked its entries


@dataclass(frozen=True)
class Sparse(Method):
    """Picks `delta().count` entries of each layer by a scorer, before the first step or before every so many."""

    density: float = 0.01
    scorer: str = "magnitude"
    rank: int = 64
    seed: int = 0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] | None = None

    phase = TRAINS
    State = State

    def __post_init__(self):
        self.delta()  # raises on a value out of range
        if self.scorer not in (*SCORERS, GRADIENT):
            raise EfftuneError(f"scorer is one of {', '.join((*SCORERS, GRADIENT))}, not {self.scorer!r}.")
        if self.rank < 1:
            raise EfftuneError(f"the rank of the approximation is at least 1, not {self.rank}.")

    @property
    def by_gradient(self) -> bool:
        """Whether entries are picked by what backward has."""
        return self.scorer == GRADIENT

    @property
    def picks_again(self) -> bool:
        """Whether entries are others once training has begun."""
        return self.by_gradient

    def why_not(self, others):
        without = [m.name for m in others if m.place == ESTIMATES and m.overrides("optimizer")]
        if self.by_gradient and without:
            return (
                f"it picks entries by their gradients, and {without[0]} trains without backward; use shira or lift "
                "with a scorer of the weight"
            )
        holding = [m.name for m in others if m.overrides("arrives")]
        if self.picks_again and holding:
            return (
                f"other entries train as time goes on, and {holding[0]} compares those of now with those that a round "
                "began with; use shira, or lift(every=0)"
            )
        return None

    def delta(self) -> Entries:
        return Entries(self.density)

    def plan(self, plan):
        delta = self.delta()
        deltas = {True: delta, False: delta.beside()}
        targets = plan.adapt(
            self, lambda layer: deltas[plan.writable(layer)], self.target_modules, self.modules_to_save
        )
        for layer in targets:
            if self.scorer == "low_rank" and self.rank > min(layer.shape):
                raise EfftuneError(
                    f"{layer.name}: rank={self.rank} exceeds min(N, K) = {min(layer.shape)} of a layer of "
                    f"{layer.shape}; choose a smaller rank or other layers."
                )

    def install(self, run):
        if self.scorer != GRADIENT:
            self.pick(run)

    def layers(self, run: Run) -> dict[str, Linear]:
        """Those that this method trains, by name, whose weights have data."""
        mine = {name for name, layer in run.plan.layers.items() if self.is_mine(layer)}
        named = {name: m for name, m in run.model.named_modules() if name in mine and isinstance(m, Linear)}
        return {name: m for name, m in named.items() if entries_of(m) and not m.indices.is_meta}

    def is_mine(self, layer) -> bool:
        return layer.by.get("delta") == self.name and layer.delta in (self.delta(), self.delta().beside())

    def is_due(self, step: int) -> bool:
        """Whether entries are picked before this step."""
        return step == 0

    def before_step(self, run):
        if run.step and self.scorer != GRADIENT and self.is_due(run.step):
            self.pick(run)

    def backward(self, micro, inner):
        run = micro.run
        if self.scorer == GRADIENT and self.is_due(run.step):
            layers, picked = self.layers(run), run.state(self).picked
            if any(picked.get(name) != run.step for name in layers):
                self.look(micro)
                picked.update(dict.fromkeys(layers, run.step))
        return inner(micro)

    def looked(self, run: Run) -> bool:
        """Whether gradients of the first step have been seen."""
        return bool(run.state(self).picked)

    def after_step(self, run):
        if run.step == 0 and self.by_gradient and self.layers(run) and not self.looked(run):
            warnings.warn(
                f"{self.name} picks entries in tuner.backward(batch, loss_fn), which this loop does not call: those "
                "that it began with go on training.",
                stacklevel=2,
            )

    def pick(self, run: Run) -> None:
        """Lets the entries of the largest scores train."""
        for name, layer in self.layers(run).items():
            matrix = Matrix(layer, self.rank, zlib.crc32(f"{self.seed}:{name}".encode()))
            rows = SCORERS[self.scorer](matrix)
            self.take(run, layer, largest(rows, matrix.shape, self.delta().count(matrix.shape)))

    def look(self, micro: Micro) -> None:
        """Lets the entries of the largest gradients of this micro-batch train."""
        layers, picks = self.layers(micro.run), dict[str, Tensor]()

        def see(name: str, g: Tensor, z: Tensor) -> None:
            shape = g.shape[1], z.shape[1]
            picks[name] = largest(gradient(g, z), shape, self.delta().count(shape))

        gradients(micro, layers, see)
        for name, found in picks.items():
            self.take(micro.run, layers[name], found)

    def take(self, run: Run, layer: Linear, picks: Tensor, forget: bool = False) -> None:
        """Lets these entries of the layer train, (S,) sorted; the optimizer's state of those that go on goes with
        them."""
        place = repick(layer, picks, forget)
        if run.optimizer is not None:
            move(run.optimizer, layer.values, place)
