"""What methods share that train a few entries of each weight: which layers, which entries, and when they change."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.delta.entries import Entries
from efftune.linear.picks import repick
from efftune.methods._base import Micro, Run
from efftune.methods.sparse._batch import GRADIENT, Picks
from efftune.methods.sparse._file import Weights
from efftune.methods.sparse._scores import SCORERS, Matrix, largest
from efftune.methods.sparse._watch import finite_gradient, gradients
from efftune.optim.contract import move, refuse_move
from efftune.plan import ALL_LINEAR

FILE = "file"  # the scorer of what another run wrote


@dataclass(frozen=True)
class Sparse(Picks):
    """Picks `delta().count` entries of each layer by a scorer, before the first step or before every so many."""

    density: float = 0.01
    scorer: str = "magnitude"
    rank: int = 64
    seed: int = 0
    file: str | None = None
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] | None = None

    of_file = (FILE,)
    what = "entries"
    instead = "shira or lift with a scorer of the weight", "shira, or lift(every=0)"

    def __post_init__(self):
        self.delta()  # raises on a value out of range
        super().__post_init__()
        if self.scorer == FILE and not self.file:
            raise EfftuneError(
                "scorer='file' picks what another run changed, and no run is given; add file='runs/full', the folder "
                "of a run of full."
            )
        if self.scorer != FILE and self.file is not None:
            raise EfftuneError(
                f"scorer={self.scorer!r} reads no file; use scorer='file', or leave file={self.file!r} out."
            )

    def delta(self) -> Entries:
        return Entries(self.density)

    def plan(self, plan):
        targets = self.adapt(plan, lambda _: self.delta())
        if self.file is not None and plan.begins:
            weights = Weights(self.file)
            for layer in targets:
                if not layer.base.trains:
                    raise EfftuneError(
                        f"{layer.name}: {layer.base} rounds the weight that {self.file} is compared with; pick by the "
                        "file without it, or by another scorer."
                    )
                module = plan.model.get_submodule(layer.name)
                weights.check(layer.name, module, layer.shape, cast(Tensor, module.weight).dtype)
            if not any(weights.differs(t.name, plan.model.get_submodule(t.name), t.shape) for t in targets):
                raise EfftuneError(
                    f"{self.file} has the very weights that the model has; give a run that changed them."
                )
        return targets

    def install(self, run):
        if self.scorer != GRADIENT and run.plan.begins:
            self.pick(run)

    def before_step(self, run):
        if run.step and self.scorer != GRADIENT and self.is_due(run.step):
            self.pick(run)

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
            picks[name] = largest(finite_gradient(g, z), shape, self.delta().count(shape))

        gradients(micro, layers, see)
        for name, found in picks.items():
            self.take(micro.run, layers[name], found)

    def take(self, run: Run, layer: Linear, picks: Tensor, forget: bool = False) -> None:
        """Lets these entries of the layer train, (S,) sorted; the optimizer's state of those that go on goes with
        them."""
        before = len(layer.indices)
        if run.optimizer is not None:
            refuse_move(run.optimizer, layer.values)
        place = repick(layer, picks, forget)
        if run.optimizer is not None:
            move(run.optimizer, layer.values, place, before)
