"""Gradients from forward passes alone: what the methods of this folder share."""

from __future__ import annotations

import math
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.methods._base import ESTIMATES, Method, Run, State
from efftune.methods.zeroth_order._perturbation import Perturbation
from efftune.modes import evaluation_mode
from efftune.optim.seed_log import DECAY, fingerprint
from efftune.optim.zeroth_order import ZerothOrderSGD, check

LOST = 0.01  # of the trained entries may be too large for eps before it is said


@dataclass
class Exactly(State):
    """The state of a zeroth-order method, which as a rule learns nothing."""

    _exactly: bool = False  # gradients are asked for


@dataclass(frozen=True)
class ZerothOrder(Method):
    """Estimates the slope a = (L(θ + εz) − L(θ − εz)) / 2ε of the loss along a random direction z from forward passes
    alone. z is drawn again from its seed wherever it is needed.

    All methods of the family have these settings; `efftune.optim.zeroth_order.ZerothOrderSGD` says how they update.

    Args:
        eps: ε. 1e-3 suits float32; bfloat16 wants more (docs/benchmarks.md), and `efftune verify` measures what it is
            worth.
        dist: the distribution of z, "normal" or "rademacher" (±1).
        seed: the seed of all draws; step t draws from (seed, t).
        points: 2, or 1: a = (L(θ_t + εz_t) − L(θ_{t−1} + εz_{t−1})) / ε takes one forward pass a step and has a larger
            variance (one-point estimate with residual feedback, Zhang et al. 2022, arXiv:2006.10820). The first step
            only looks.
        samples: how many directions a step has; their estimates are averaged.
        momentum, beta2: those of the update.
        update: "stochastic" rounds 16-bit weights stochastically, "exact" refuses them, and "log" writes the first
            weights plus the sum over all steps, rounded once. That takes a draw for each different seed so far, and a
            copy in host memory.
        per_layer: "variance" or "expectation" perturbs each tensor in proportion to the size of its weights.
    """

    eps: float = 1e-3
    dist: str = "normal"
    seed: int = 0
    points: int = 2
    samples: int = 1
    momentum: float = 0.0
    beta2: float = 0.0
    update: str = "stochastic"
    per_layer: str = "none"

    sparsity = 0.0
    place = ESTIMATES
    State = Exactly
    learning_rate = 1e-6  # in Malladi et al. 2023, for models of billions of parameters

    def __post_init__(self):
        if not self.eps > 0:
            raise EfftuneError(f"{self.name} needs eps > 0, not {self.eps}; 1e-3 is usual.")
        if self.points not in (1, 2) or self.samples < 1:
            raise EfftuneError(
                f"{self.name} takes 1 or 2 points and at least 1 sample, not {self.points} and {self.samples}."
            )
        check(**self._of_optimizer())

    def _of_optimizer(self) -> dict[str, Any]:
        names = "dist", "momentum", "beta2", "update", "per_layer", "sparsity"
        return {name: getattr(self, name) for name in names}

    def optimizer(self, groups, **defaults):
        return ZerothOrderSGD(groups, **self._of_optimizer(), **defaults)

    def directions(self, run: Run) -> list[tuple[int, float]]:
        """The step's directions: their seeds, and the weights of their estimates."""
        draw = random.Random(f"{self.seed}:{run.step}")
        return [(draw.randrange(DECAY), 1.0) for _ in range(self.samples)]

    def weights(self, run: Run) -> dict[int, float]:
        """The factor of each seed's estimate in the step's mean; a seed that is drawn twice counts twice."""
        found: dict[int, float] = defaultdict(float)
        for seed, weight in self.directions(run):
            found[seed] += weight / self.samples
        return found

    @contextmanager
    def exactly(self, run: Run) -> Iterator[None]:
        run.state(self)._exactly = True
        try:
            yield
        finally:
            run.state(self)._exactly = False

    @torch.no_grad()
    def backward(self, micro, inner):
        run, model, batch, loss_fn = micro.run, micro.model, micro.batch, micro.loss
        step, optimizer = run.step, run.optimizer
        if run.state(self)._exactly:
            with evaluation_mode(model), torch.enable_grad():
                return inner(micro)
        if not isinstance(optimizer, ZerothOrderSGD):
            raise EfftuneError(
                f"{self.name} has no gradient tensors to give; make the optimizer with tuner.optimizer(lr=...)."
            )
        if step == 0 and not optimizer.base:
            optimizer.base = fingerprint(model)
        shown, used = [], set[int]()
        with evaluation_mode(model), Perturbation(model, optimizer) as perturbation:
            for index, (seed, weight) in enumerate(self.directions(run)):
                plus, used_here = loss_at(model, batch, loss_fn, perturbation, self.eps, seed)
                if self.points == 2:
                    minus, also = loss_at(model, batch, loss_fn, perturbation, -self.eps, seed)
                    used_here |= also  # a router may send the two signs different ways
                    a = (plus - minus) * micro.scale / (2 * self.eps)
                    loss = torch.where(a.isfinite(), (plus + minus) / 2, plus.fmin(minus))
                else:
                    a, loss = optimizer.scalars.one_point_difference(index, plus * micro.scale) / self.eps, plus
                optimizer.scalars.accumulate(seed, a * (weight / self.samples), used_here)
                shown.append(loss)
                used |= used_here
        if step == 0:
            warn_of_lost(self, optimizer, used)
        return torch.stack(shown).mean()

    def report(self, run):
        if not isinstance(run.optimizer, ZerothOrderSGD):
            return None
        scalars = run.optimizer.scalars
        total, skipped, flat = map(int, (scalars.directions, scalars.skipped, scalars.flat))
        lines = []
        if skipped:
            lines.append(f"{skipped} of {total} directions skipped, whose loss was not finite")
        if flat:
            lines.append(f"{flat} of {total} directions had the same loss on both sides; a larger eps may tell more")
        return f"{self.name}: {'; '.join(lines)}" if lines else None


def loss_at(model, batch, loss_fn, perturbation: Perturbation, eps: float, seed: int) -> tuple[Tensor, frozenset[int]]:
    """Returns L(θ + eps·z) in float64, and the ids of the parameters that were used so."""
    with perturbation.by(eps, seed) as used:
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor):
            loss = torch.tensor(loss, device="cpu")
    if loss.numel() != 1:
        raise EfftuneError(f"The loss function returns one number, not a tensor of shape {tuple(loss.shape)}.")
    return loss.detach().double().reshape(()), frozenset(used)


def warn_of_lost(method: ZerothOrder, optimizer: ZerothOrderSGD, used: Set[int]) -> None:
    """Warns of weights that no forward pass used, and of weights that are too large for ε."""
    training = {name: p for name, p in optimizer.named_parameters() if p.requires_grad}
    unused = [name for name, p in training.items() if id(p) not in used]
    if unused:
        warnings.warn(
            f"{method.name}: no module's forward used {', '.join(unused[:5])}; they are not trained.", stacklevel=4
        )
    needed = {name: half_place(p) / optimizer.directions.scale(name) for name, p in training.items()}
    lost = {name: eps for name, eps in needed.items() if eps > method.eps}
    total = sum(p.numel() for p in training.values())
    if sum(training[name].numel() for name in lost) > LOST * total:
        name = max(lost, key=lambda n: lost[n])
        warnings.warn(
            f"{method.name}: eps={method.eps:g} is below half a unit in the last place of {len(lost)} tensors, so that "
            f"most of z is rounded away; the smallest that is not lost is {lost[name]:.2g} (for {name}, "
            f"{str(training[name].dtype).removeprefix('torch.')}).",
            stacklevel=4,
        )


def half_place(w: Tensor) -> float:
    """Returns half a unit in the last place of a number as large as the root mean square of w's entries."""
    size = float(w.detach().float().square().mean().sqrt())
    return torch.finfo(w.dtype).eps / 2 * 2.0 ** math.floor(math.log2(size)) if 0 < size < math.inf else 0.0
