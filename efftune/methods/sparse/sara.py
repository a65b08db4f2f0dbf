"""SaRA: the smallest weights train, as a sparse matrix of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.methods._base import ESTIMATES, Run
from efftune.methods.sparse import _batch
from efftune.methods.sparse._scores import Picked, at, polar, tiles
from efftune.methods.sparse._sparse import Sparse


@dataclass
class State(_batch.State):
    """By layer: the size below which entries train, U·Vᵀ at its entries, and the step that this is of."""

    bounds: dict[str, float] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    renewed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sara(Sparse):
    """Trains the entries of each linear layer's weight that are nearest to 0, and keeps what they make up of low rank.

    The loss has nuclear · ‖W⊙M‖_* besides, for each weight, where M has the entries that train. Its gradient, U·Vᵀ of
    the `rank` largest singular values, is added in `tuner.backward`, whose result is the loss without. Before step
    `again` entries that have grown out of the bound leave, and stay as they were trained. The others keep their
    optimizer state.

    Args:
        threshold: entries with |w| below it train, where a layer has any; None: the share `density` of each weight, the
            smallest ones, and the bound is the largest of them.
        again: the step before which entries leave; 0: they never do.
        nuclear: the weight of the norm; 0: none.   renew: steps between two singular value decompositions.
        rank: their rank; all, if a layer has no more.   seed: of their draws.
        target_modules, modules_to_save: see `lora`.
    Memory: besides that of `shira`, 4 bytes an entry for U·Vᵀ, and while it is made some (N + K)·5·(rank + 8) numbers.
    Source: Hu et al. 2024, arXiv:2409.06633. The code published with it writes |w| into the model where it takes the
        masks, forgets the optimizer state there, and makes a full decomposition in each step.
    """

    density: float = 0.1
    scorer: ClassVar[str] = "small"
    file: ClassVar[str | None] = None
    threshold: float | None = None
    again: int = 200
    nuclear: float = 5e-4
    renew: int = 20

    name = "sara"
    State = State

    def __post_init__(self):
        super().__post_init__()
        if self.threshold is not None and not self.threshold > 0:
            raise EfftuneError(f"entries below the threshold train, which is above 0, not threshold={self.threshold}.")
        if self.again < 0 or self.nuclear < 0:
            raise EfftuneError(f"again={self.again} and nuclear={self.nuclear} are 0 or more; 0 means never, and none.")
        if self.renew < 1:
            raise EfftuneError(f"singular vectors are renewed every so many steps, at least 1, not renew={self.renew}.")

    @property
    def picks_again(self):
        return self.again > 0

    def why_not(self, others):
        without = [m.name for m in others if m.place == ESTIMATES and m.overrides("optimizer")]
        if (self.nuclear or self.again) and without:
            return (
                f"{without[0]} has no gradients that a nuclear norm is added to, and does not follow entries that "
                "leave; use sara(nuclear=0, again=0)"
            )
        return super().why_not(others)

    def plan(self, plan):
        targets = super().plan(plan)
        if self.threshold is not None and plan.begins:
            weights = [plan.model.get_submodule(layer.name).weight for layer in targets]
            parts = (part for weight in weights for part in weight.split(1024))
            if not any(part.is_meta or (part.abs() < self.threshold).any() for part in parts):
                raise EfftuneError(
                    f"none of {len(targets)} layers has a weight below threshold={self.threshold}; use a larger one."
                )
        return targets

    def picks(self, name, matrix):
        if self.threshold is None:
            return super().picks(name, matrix)
        k, found = matrix.shape[1], []
        for a, b in tiles(matrix.shape):
            found.append((matrix.rows(a, b).abs() < self.threshold).flatten().nonzero().flatten() + a * k)
        return torch.cat(found)

    def before_step(self, run):
        if self.again and run.step == self.again:
            bounds = run.state(self).bounds
            for name, layer in self.layers(run).items():
                if name not in bounds:  # else those that are left now would set another one, if the run resumes here
                    bounds[name] = self.threshold or math.nextafter(_largest(layer), math.inf)
                stay = Picked(layer, 0, 0).values.double().abs() < bounds[name]
                if not stay.all():
                    self.take(run, layer, layer.indices[stay])

    def backward(self, micro, inner):
        loss, run = super().backward(micro, inner), micro.run
        for name, layer in self.layers(run).items():
            if self.nuclear and layer.values.grad is not None and len(layer.indices):
                layer.values.grad.add_(self.factor(run, name, layer), alpha=self.nuclear * micro.scale)
        return loss

    def factor(self, run: Run, name: str, layer: Linear) -> Tensor:
        """U·Vᵀ at the entries of the layer, of this step or of the last one that renewed it."""
        state, due = run.state(self), run.step - run.step % self.renew
        if 0 < self.again <= run.step:
            due = max(due, self.again)  # there are fewer entries since
        if state.renewed.get(name) != due:
            state.factors[name] = polar(Picked(layer, self.rank, self.seed_of(name)))
            state.renewed[name] = due
        return state.factors[name].to(layer.values.device)

    def missed(self, run):
        without = self.nuclear and not run.state(self).renewed
        return ("adds its nuclear norm", "there is none") if without else None


def _largest(layer: Linear) -> float:
    """The largest |w| of the entries that train, as they were stored."""
    w, shape = layer.take_back(), (layer.out_features, layer.in_features)
    return float(at(lambda a, b: layer.base.rows(w, a, b, layer.values.dtype), shape, layer.indices).abs().max())
