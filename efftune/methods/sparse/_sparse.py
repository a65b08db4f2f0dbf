"""What methods share that train a few entries of each weight: which layers, which entries, and when they change."""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.delta.entries import Entries
from efftune.linear.picks import entries_of, repick
from efftune.methods import _base
from efftune.methods._base import ESTIMATES, TRAINS, Method, Micro, Run
from efftune.methods.sparse._file import Weights
from efftune.methods.sparse._scores import SCORERS, Matrix, largest
from efftune.methods.sparse._watch import gradient, gradients
from efftune.optim.contract import move
from efftune.plan import ALL_LINEAR

GRADIENT, FILE = "gradient", "file"  # scorers that need a batch, and what another run wrote


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
    file: str | None = None
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] | None = None

    phase = TRAINS
    State = State

    def __post_init__(self):
        self.delta()  # raises on a value out of range
        if self.scorer not in (*SCORERS, GRADIENT, FILE):
            raise EfftuneError(f"scorer is one of {', '.join((*SCORERS, GRADIENT, FILE))}, not {self.scorer!r}.")
        if self.scorer == FILE and not self.file:
            raise EfftuneError(
                "scorer='file' picks what another run changed, and no run is given; add file='runs/full', the folder "
                "of a run of full."
            )
        if self.scorer != FILE and self.file is not None:
            raise EfftuneError(
                f"scorer={self.scorer!r} reads no file; use scorer='file', or leave file={self.file!r} out."
            )
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
        targets = plan.adapt(self, self.delta(), self.target_modules, self.modules_to_save)
        for layer in targets:
            if self.scorer == "low_rank" and self.rank > min(layer.shape):
                raise EfftuneError(
                    f"{layer.name}: rank={self.rank} exceeds min(N, K) = {min(layer.shape)} of a layer of "
                    f"{layer.shape}; choose a smaller rank or other layers."
                )
        if self.file is not None and plan.begins:
            weights = Weights(self.file)
            for layer in targets:
                module = plan.model.get_submodule(layer.name)
                weights.check(layer.name, module, layer.shape, cast(Tensor, module.weight).dtype)
        return targets

    def install(self, run):
        if self.scorer != GRADIENT and run.plan.begins:
            self.pick(run)

    def layers(self, run: Run) -> dict[str, Linear]:
        """Those that this method trains, by name, whose weights have data."""
        mine = {name for name, layer in run.plan.layers.items() if self.is_mine(layer)}
        named = {name: m for name, m in run.model.named_modules() if name in mine and isinstance(m, Linear)}
        return {name: m for name, m in named.items() if entries_of(m) and not m.indices.is_meta}

    def is_mine(self, layer) -> bool:
        return layer.by.get("delta") == self.name and layer.delta == self.delta()

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

    def missed(self, run: Run) -> tuple[str, str] | None:
        """What it does in `backward`, and what becomes of it in a loop that did not call that in the first step."""
        if self.by_gradient and not self.looked(run):
            return "picks entries", "those that it began with go on training"
        return None

    def after_step(self, run):
        if run.step == 0 and self.layers(run) and (words := self.missed(run)):
            what, then = words
            warnings.warn(
                f"{self.name} {what} in tuner.backward(batch, loss_fn), which this loop does not call: {then}.",
                stacklevel=2,
            )

    def pick(self, run: Run) -> None:
        """Lets the entries of the largest scores train."""
        for name, layer in self.layers(run).items():
            matrix = Matrix(layer, self.rank, self.seed_of(name))
            self.take(run, layer, self.picks(name, matrix))

    def picks(self, name: str, matrix: Matrix) -> Tensor:
        """The entries of the largest scores of a layer, (S,) sorted."""
        rows = Weights(self.file).changed(matrix, name) if self.file else SCORERS[self.scorer](matrix)
        return largest(rows, matrix.shape, self.delta().count(matrix.shape))

    def seed_of(self, name: str) -> int:
        """Of what is drawn for a layer."""
        return zlib.crc32(f"{self.seed}:{name}".encode())

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
