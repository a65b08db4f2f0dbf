"""What methods share that train a few entries of each weight: which layers, which entries, and when they change."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.delta.entries import Entries, entries_of, repick
from efftune.methods._base import TRAINS, Method, Run
from efftune.methods.sparse._scores import SCORERS, Matrix
from efftune.ops.topk_entries import topk_entries
from efftune.optim.contract import move
from efftune.plan import ALL_LINEAR


@dataclass(frozen=True)
class Sparse(Method):
    """Picks `delta().count` entries of each layer by a scorer, once, or every so many steps."""

    density: float = 0.01
    scorer: str = "magnitude"
    rank: int = 64
    seed: int = 0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] | None = None

    phase = TRAINS

    def __post_init__(self):
        self.delta()  # raises on a value out of range
        if self.scorer not in SCORERS:
            raise EfftuneError(f"scorer is one of {', '.join(SCORERS)}, not {self.scorer!r}.")
        if self.rank < 1:
            raise EfftuneError(f"the rank of the approximation is at least 1, not {self.rank}.")

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

    def install(self, run):
        self.pick(run)

    def layers(self, run: Run) -> dict[str, Linear]:
        """Those that this method trains, by name."""
        found = {name: module for name, module in run.model.named_modules() if entries_of(module)}
        return {name: found[name] for name, layer in run.plan.layers.items() if name in found and self.is_of(layer)}

    def is_of(self, layer) -> bool:
        return layer.by.get("delta") == self.name and layer.delta == self.delta()

    def pick(self, run: Run) -> None:
        """Lets the entries of the largest scores train; the optimizer's state of those that go on goes with them."""
        for name, layer in self.layers(run).items():
            if layer.indices.is_meta:
                continue
            place = repick(layer, self.picks(name, layer))
            if run.optimizer is not None:
                move(run.optimizer, layer.values, place)

    def picks(self, name: str, layer: Linear) -> Tensor:
        """(S,) int32, sorted."""
        matrix = Matrix(layer, self.rank, zlib.crc32(f"{self.seed}:{name}".encode()))
        rows = SCORERS[self.scorer](matrix)
        return topk_entries((lambda: (rows(a, b) for a, b in matrix.tiles())), self.delta().count(matrix.shape))
