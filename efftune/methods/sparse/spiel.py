"""SpIEL: entries that train are dropped and grown as training goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.methods import _base
from efftune.methods._base import Run
from efftune.methods.sparse._scores import Rows, at, largest
from efftune.methods.sparse._sparse import Sparse
from efftune.methods.sparse._watch import NotFinite, finite_gradient, overflows, watching
from efftune.ops.entries_grad import entries_grad
from efftune.optim.sm3 import SM3

AG, MA = "ag", "ma"


@dataclass
class State(_base.State):
    """By layer: the entries that may grow, (S,) int32, and the sums of their gradients, (S,) float32."""

    candidates: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    begun: bool = True  # with random entries, all of which make room before step `accumulate`; not if it was loaded
    replaced: dict[str, int] = field(default_factory=dict)  # by layer: the last step before which entries were
    _called: bool = False  # backward, in this process


@dataclass(frozen=True)
class Spiel(Sparse):
    """Trains a few entries of each linear layer's weight, and now and then replaces those that moved least by those
    with the largest gradients.

    Entries are random at first. Before step `accumulate` all of them are replaced (not those of an adapter that was
    loaded, which have learnt), then, before every `every`-th step,
    a share that falls linearly from `rate` to 0 at step `until`. Those with the smallest |δ| are dropped, and are what
    they were before. Entries that stay keep their optimizer state, and new ones begin with none.

    Which entries are grown, `criterion` says. "ag", accumulated gradients: those with the largest |sum of gradients|
    over `accumulate` steps, among as many candidates as there are trained entries: those with the largest gradients of
    the first micro-batch of these steps. "ma", momentum approximation: the recipe brings `efftune.optim.sm3.SM3` as its
    optimizer, whose state is a number for each row and column of a weight, and those are grown whose row · column is
    largest; it looks at no gradient of what does not train, and needs no `tuner.backward`.

    Args:
        density: the share of a weight's entries that train.   rate: the share of them that is replaced.
        every: steps between replacements.   accumulate: steps whose gradients decide.
        until: the step at which replacements end; None: the share stays `rate`.   criterion: "ag" or "ma".
        scorer, rank, seed: of the first picks, see `shira`.   target_modules, modules_to_save: see `lora`.
    Source: Ansell et al. 2024, arXiv:2401.16405 (SpIEL-AG, SpIEL-MA). The code published with it corrects the moments
        of grown entries for age twice, and does not count the age of 16-bit ones; with "ma" it sorts the entries and
        leaves the momentum in their old order, and has 1e-8 under the root of SM3, where g² is often smaller.
    """

    scorer: str = "random"
    every: int = 100
    accumulate: int = 5
    rate: float = 0.2
    until: int | None = None
    criterion: str = AG

    name = "spiel"
    of_batch = ()  # the scorer is for the first picks only
    State = State

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.accumulate <= self.every:
            raise EfftuneError(
                f"gradients of {self.accumulate} steps decide every {self.every} steps; accumulate lies in 1..every."
            )
        if not 0 <= self.rate <= 1:
            raise EfftuneError(f"the share of entries that is replaced lies in [0, 1], not {self.rate}.")
        if self.until is not None and self.until < 1:
            raise EfftuneError(
                f"replacements end at a step after the first, not until={self.until}; None: they do not."
            )
        if self.criterion not in (AG, MA):
            raise EfftuneError(
                f"criterion is 'ag' (accumulated gradients) or 'ma' (momentum approximation), not {self.criterion!r}."
            )

    @property
    def by_batch(self):
        return self.criterion == AG

    @property
    def picks_again(self):
        return True

    def overrides(self, hook):
        return super().overrides(hook) and (hook != "optimizer" or self.criterion == MA)

    def optimizer(self, groups, **defaults):
        return SM3(groups, **defaults) if self.criterion == MA else None

    def looked(self, run):
        return run.state(self)._called

    def install(self, run):
        super().install(run)
        run.state(self).begun = run.plan.begins

    def share(self, step: int, begun: bool) -> float:
        """Of the entries, those that are replaced before this step."""
        if begun and step == self.accumulate:
            return 1.0
        if step < self.every or step % self.every:
            return 0.0
        return self.rate if self.until is None else self.rate * max(0.0, 1 - step / self.until)

    def is_due(self, step):
        return False

    def before_step(self, run):
        state = run.state(self)
        share = self.share(run.step, state.begun)
        if self.criterion == MA and run.optimizer is not None:
            if not isinstance(run.optimizer, SM3):
                raise EfftuneError(
                    "spiel(criterion='ma') grows entries by the state of SM3, and the optimizer is "
                    f"{type(run.optimizer).__name__}; take the one of tuner.optimizer(lr=...), or criterion='ag'."
                )
            for layer in self.layers(run).values():
                run.optimizer.cover(layer.values, layer.indices, (layer.out_features, layer.in_features))
        for name, layer in self.layers(run).items() if share else ():
            if state.replaced.get(name) != run.step:  # else a run goes on before the step that it has replaced for
                self.replace(run, layer, share, *self.grown(run, name, layer, share))
                state.replaced[name] = run.step

    def grown(self, run: Run, name: str, layer: Linear, share: float) -> tuple[Tensor, Tensor]:
        """The entries that may be grown, (C,), none of which trains, and their scores."""
        if self.criterion == MA:
            bounds = run.optimizer.bounds(layer.values) if run.optimizer is not None else None
            if bounds is None:  # nothing of it has trained so far
                return layer.indices[:0], layer.values[:0]
            shape, count = (layer.out_features, layer.in_features), int(share * len(layer.indices))
            rows = products(bounds[0], bounds[1], layer.indices)
            best = largest(rows, shape, min(count, shape[0] * shape[1] - len(layer.indices)))
            scores = at(rows, shape, best)
            return best[scores > 0], scores[scores > 0]
        state, old = run.state(self), layer.indices
        candidates, sums = state.candidates.pop(name, old[:0]).to(old.device), state.sums.pop(name, None)
        scores = torch.zeros_like(candidates) if sums is None else sums.to(old.device).abs()
        new = ~torch.isin(candidates, old)
        return candidates[new], scores[new]

    def replace(self, run: Run, layer: Linear, share: float, candidates: Tensor, scores: Tensor) -> None:
        old, change = layer.indices, layer.values.detach().abs()
        count = min(int(share * len(old)), len(candidates))
        if count:
            stay = change.sort(descending=True, stable=True).indices[: len(old) - count]
            grow = scores.sort(descending=True, stable=True).indices[:count]
            self.take(run, layer, torch.cat([old[stay], candidates[grow]]).sort().values, forget=True)

    def backward(self, micro, inner):
        run, state = micro.run, micro.run.state(self)
        state._called = True
        soon = any(self.share(run.step + i, state.begun) for i in range(1, self.accumulate + 1))
        if self.criterion == MA or not soon:
            return inner(micro)

        def see(name: str, g: Tensor, z: Tensor) -> None:
            if name not in state.sums:
                shape = g.shape[1], z.shape[1]
                state.candidates[name] = largest(finite_gradient(g, z), shape, self.delta().count(shape))
                state.sums[name] = torch.zeros_like(state.candidates[name], dtype=torch.float32)
            found = entries_grad(g, z, state.candidates[name].to(g.device)) / max(1.0, micro.scale)
            if not bool(found.isfinite().all()):
                raise NotFinite("A gradient that entries grow by is NaN or Inf; look for it in weights and batch.")
            state.sums[name] += found.to(state.sums[name])

        def see_finite(name: str, g: Tensor, z: Tensor) -> None:
            try:
                see(name, g, z)
            except NotFinite:
                if not overflows(micro):
                    raise

        with watching(self.layers(run), see_finite):
            return inner(micro)


def products(row: Tensor, column: Tensor, taken: Tensor) -> Rows:
    """√(row · column), by rows; -1 at the entries `taken`, (S,) sorted."""
    row, column = row.sqrt().float(), column.sqrt().float()  # of sums of squares: their products leave float32's range

    def rows(a: int, b: int) -> Tensor:
        scores = row[a:b, None] * column
        k = len(column)
        first, last = torch.searchsorted(taken, torch.tensor([a * k, b * k], device=taken.device)).tolist()
        scores.view(-1)[taken[first:last].long() - a * k] = -1
        return scores

    return rows
