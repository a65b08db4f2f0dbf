"""SpIEL: entries that train are dropped and grown as training goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.methods import _base
from efftune.methods._base import Run
from efftune.methods.sparse._scores import largest
from efftune.methods.sparse._sparse import Sparse
from efftune.methods.sparse._watch import gradient, watching
from efftune.ops.entries_grad import entries_grad


@dataclass
class State(_base.State):
    """By layer: the entries that may grow, (S,) int32, and the sums of their gradients, (S,) float32."""

    candidates: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Spiel(Sparse):
    """Trains a few entries of each linear layer's weight, and now and then replaces those that moved least by those
    with the largest gradients.

    Entries are random at first. Before step `accumulate` all of them are replaced, then, before every `every`-th step,
    a share that falls linearly from `rate` to 0 at step `until`. Those with the smallest |δ| are dropped, and are what
    they were before. Those with the largest |sum of gradients| over `accumulate` steps are grown, among as many
    candidates as there are trained entries: those with the largest gradients of the first micro-batch of these steps.
    Entries that stay keep their optimizer state, and new ones begin with none.

    Args:
        density: the share of a weight's entries that train.   rate: the share of them that is replaced.
        every: steps between replacements.   accumulate: steps whose gradients decide.
        until: the step at which replacements end; None: the share stays `rate`.
        scorer, rank, seed: of the first picks, see `shira`.   target_modules, modules_to_save: see `lora`.
    Source: Ansell et al. 2024, arXiv:2401.16405 (SpIEL-AG). The code published with it corrects the moments of grown
        entries for age twice, and does not count the age of 16-bit ones.
    """

    scorer: str = "random"
    every: int = 100
    accumulate: int = 5
    rate: float = 0.2
    until: int | None = None

    name = "spiel"
    State = State

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.accumulate <= self.every:
            raise EfftuneError(
                f"gradients of {self.accumulate} steps decide every {self.every} steps; accumulate lies in 1..every."
            )
        if not 0 <= self.rate <= 1:
            raise EfftuneError(f"the share of entries that is replaced lies in [0, 1], not {self.rate}.")

    @property
    def by_batch(self):
        return True

    def looked(self, run):
        return bool(run.state(self).sums)

    def share(self, step: int) -> float:
        """Of the entries, those that are replaced before this step."""
        if step == self.accumulate:
            return 1.0
        if step < self.every or step % self.every:
            return 0.0
        return self.rate if self.until is None else self.rate * max(0.0, 1 - step / self.until)

    def is_due(self, step):
        return False  # the scorer is for the first picks only

    def before_step(self, run):
        state = run.state(self)
        if state.sums and (share := self.share(run.step)):
            for name, layer in self.layers(run).items():
                if name in state.sums:
                    self.replace(run, layer, share, state.candidates.pop(name), state.sums.pop(name))

    def replace(self, run: Run, layer: Linear, share: float, candidates: Tensor, sums: Tensor) -> None:
        old, change = layer.indices, layer.values.detach().abs()
        candidates, sums = candidates.to(old.device), sums.to(old.device)
        new = ~torch.isin(candidates, old)
        candidates, sums = candidates[new], sums[new]
        count = min(int(share * len(old)), len(candidates))
        stay = change.sort(descending=True, stable=True).indices[: len(old) - count]
        grow = sums.abs().sort(descending=True, stable=True).indices[:count]
        self.take(run, layer, torch.cat([old[stay], candidates[grow]]).sort().values, forget=True)

    def backward(self, micro, inner):
        run = micro.run
        if not any(self.share(run.step + i) for i in range(1, self.accumulate + 1)):
            return inner(micro)
        state = run.state(self)

        def see(name: str, g: Tensor, z: Tensor) -> None:
            if name not in state.sums:
                shape = g.shape[1], z.shape[1]
                state.candidates[name] = largest(gradient(g, z), shape, self.delta().count(shape))
                state.sums[name] = torch.zeros_like(state.candidates[name], dtype=torch.float32)
            state.sums[name] += entries_grad(g, z, state.candidates[name].to(g.device)).to(state.sums[name])

        with watching(self.layers(run), see):
            return inner(micro)
