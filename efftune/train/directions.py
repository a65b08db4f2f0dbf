"""How far the estimates of a zeroth-order recipe are from the gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from efftune.methods.zeroth_order._estimate import ZerothOrder
from efftune.optim.zeroth_order import ZerothOrderSGD
from efftune.train.fidelity import Fidelity, coordinates, fidelity, gradients, negligible, normal_score
from efftune.train.task import Task
from efftune.tuner import Tuner

FACTORS = (0.01, 0.1, 0.3, 1, 3, 10, 100)  # of ε, at which a few steps are looked at
FEW = 8


@dataclass
class Directions:
    """Of the estimates Σ a·z, over all that trains, against t, what their mean is to be: the gradient (of the entries
    that do not rest; with per_layer="expectation" times s)."""

    entries: int  # that train
    slope: float  # Σ a·<g, z> / Σ <g, z>², with the exact derivative <g, z>: 1, but for O(ε²)
    slope_z: float  # of slope - 1
    residual: float  # rms(a - <g, z>) / rms(<g, z>): that error, and the rounding of weights and losses
    mean: float  # of <estimate, t> / ‖t‖²: 1 if directions are drawn fairly
    mean_error: float  # standard error of `mean`
    mean_z: float  # of mean - 1
    length: float  # mean of ‖estimate‖² / ‖t‖²
    expected: float  # which exact derivatives along fair directions would give it: d + 2 for one normal one
    residuals: dict[float, float]  # by ε, of a few steps each

    def __str__(self) -> str:
        return (
            f"over {self.entries:,} trained entries, of estimates a·z of the gradient g:\n"
            f"  a / <g, z>            {self.slope:.4f}, z {self.slope_z:.1f}, residual {self.residual:.2%}\n"
            f"  <estimate, g> / |g|²  {self.mean:.2f} ± {self.mean_error:.2f}, z {self.mean_z:.1f}\n"
            f"  |estimate|² / |g|²    {self.length:,.0f}, and {self.expected:,.0f} expected of exact derivatives\n"
            f"  residual by eps       {'  '.join(f'{eps:.1e}: {r:.1%}' for eps, r in self.residuals.items())}"
        )


@torch.no_grad()
def measure(
    tuner: Tuner, optimizer: ZerothOrderSGD, task: Task, data: list[Any], steps: int
) -> tuple[list[Fidelity], Directions]:
    """Of the first batch's estimates in `steps` steps that the recipe would take from where it is. None is taken.

    What an estimate misses of the gradient is nearly all due to the draw, z·zᵀ for the identity, in which a bias would
    drown. So `bias` and `z` are of the estimates minus what the same draws make of exact derivatives, which has none.
    """
    where, parameters = coordinates(tuner), tuner.named_trained()

    def chosen(name: str, t: Tensor) -> Tensor:
        return t.flatten()[where[name]].double().cpu()

    exact, target = [], {}
    with tuner.exactly():
        for batch in reversed(data):
            target = meant(tuner, optimizer, task, batch)
            exact.insert(0, {name: chosen(name, t) for name, t in target.items()})
    scalars, lengths, along = [], [], []
    errors, against = {name: [] for name in where}, {name: [] for name in where}
    for a, derivatives, used in draws(tuner, optimizer, task, data[0], target, steps):
        scalars.append((a, derivatives))
        lengths.append(0.0)
        along.append(0.0)
        for name, t in target.items():
            estimate, ideal = torch.zeros_like(t), t  # of what is not perturbed
            if id(parameters[name]) in used:
                estimate, ideal = (optimizer.estimate(name, parameters[name], by_seed) for by_seed in (a, derivatives))
            lengths[-1] += dot(estimate, estimate)
            along[-1] += dot(estimate, t)
            errors[name].append(chosen(name, estimate - t))
            against[name].append(chosen(name, estimate - ideal))

    results, least = [], negligible(exact[0])
    for name in where:
        batches = torch.stack([t[name] for t in exact])
        total, own = (
            fidelity(name, torch.stack(of[name]), batches[0], batches, 0, least * len(where[name]))
            for of in (errors, against)
        )
        results.append(replace(total, bias=own.bias, z=own.z))
    residuals = {}
    for factor in FACTORS:
        with nearer(tuner, factor) as eps:
            few = draws(tuner, optimizer, task, data[0], target, min(steps, FEW))
            residuals[eps] = residual(*pairs((a, derivatives) for a, derivatives, _ in few))
    return results, summary(optimizer, parameters, target, *pairs(scalars), along, lengths, residuals)


def own(tuner: Tuner) -> ZerothOrder:
    return next(m for m in tuner.methods if isinstance(m, ZerothOrder))


@contextmanager
def nearer(tuner: Tuner, factor: float) -> Iterator[float]:
    """Within it the recipe takes `factor` times its ε, which it yields."""
    methods, eps = tuner.methods, factor * own(tuner).eps
    tuner.methods = [replace(m, eps=eps) if isinstance(m, ZerothOrder) else m for m in methods]
    try:
        yield eps
    finally:
        tuner.methods = methods


def pairs(steps: Iterable[tuple[dict[int, float], dict[int, float]]]) -> tuple[Tensor, Tensor]:
    """By seed a and the exact derivative -> a (n,), exact (n,) of all steps."""
    every = [(a[seed], exact[seed]) for a, exact in steps for seed in a]
    a, exact = torch.tensor(every, dtype=torch.float64).unbind(1)
    return a, exact


def residual(a: Tensor, exact: Tensor) -> float:
    return float(((a - exact).square().sum() / exact.square().sum()).sqrt())


def meant(tuner: Tuner, optimizer: ZerothOrderSGD, task: Task, batch: Any) -> dict[str, Tensor]:
    """What the mean of the estimates is to be. Within `tuner.exactly()`."""
    parameters = tuner.named_trained()
    with torch.enable_grad():
        found = gradients(tuner, task, batch)
    for name, g in found.items():
        t = g.to(torch.promote_types(g.dtype, torch.float32)) * (optimizer.scale(name) * optimizer.unscaled(name))
        found[name] = torch.where(small(optimizer, name, parameters[name]), t, 0.0)
    return found


def small(optimizer: ZerothOrderSGD, name: str, w: Tensor) -> Tensor:
    """Which entries train: all, but for sparsity."""
    threshold = optimizer.threshold(name, w)
    return torch.ones_like(w, dtype=torch.bool) if threshold is None else w.abs() <= threshold


def draws(
    tuner: Tuner, optimizer: ZerothOrderSGD, task: Task, batch: Any, target: dict[str, Tensor], steps: int
) -> Iterator[tuple[dict[int, float], dict[int, float], set[int]]]:
    """Step by step: by seed a and the exact derivative, both as the method weights them, and the ids of what is
    perturbed."""
    method, parameters = own(tuner), tuner.named_trained()
    start = tuner.step
    for tuner.step in range(start, start + steps):
        weights = defaultdict(float)
        for seed, weight in method.directions(tuner.model, tuner.step):
            weights[seed] += weight / method.samples
        optimizer.zero_grad()
        tuner.backward(batch, task.loss, 1.0 / max(1, task.terms(batch)))
        optimizer.remember()
        a = {seed: float(a) for seed, (a, _) in optimizer.pending.items()}
        used = {i for _, ids in optimizer.pending.values() for i in ids}
        exact = dict.fromkeys(a, 0.0)
        for name in (name for name in target if id(parameters[name]) in used):
            for seed in a:  # u·z and t have a factor u each, which <g, s·z> has not
                z = optimizer.estimate(name, parameters[name], {seed: weights[seed]})
                exact[seed] += dot(z, target[name]) / optimizer.unscaled(name) ** 2
        yield a, exact, used
    tuner.step = start
    optimizer.zero_grad()


def summary(
    optimizer: ZerothOrderSGD,
    parameters: dict[str, nn.Parameter],
    target: dict[str, Tensor],
    a: Tensor,
    exact: Tensor,
    along: list[float],
    lengths: list[float],
    residuals: dict[float, float],
) -> Directions:
    """a, exact: of each direction; along: <estimate, t> of each step; lengths: ‖estimate‖² of each step."""
    squares, size = exact.square().sum(), sum(dot(t, t) for t in target.values())
    fair = torch.tensor(along, dtype=torch.float64) / size
    # One direction: E‖u∘z·<v, z>‖² with t = u∘v is Σ u²·‖v‖² for ±1 draws, and 2‖t‖² more for normal ones.
    u = {name: optimizer.unscaled(name) for name in target}
    entries = {name: int(small(optimizer, name, parameters[name]).sum()) for name in target}
    v = sum(dot(t, t) / u[name] ** 2 for name, t in target.items())
    one = v / size * sum(entries[name] * u[name] ** 2 for name in target) + 2 * (optimizer.dist == "normal")
    return Directions(
        entries=sum(entries.values()),
        slope=float((a * exact).sum() / squares),
        slope_z=normal_score((a - exact) * exact),
        residual=residual(a, exact),
        mean=float(fair.mean()),
        mean_error=float(fair.std() / len(fair) ** 0.5),
        mean_z=normal_score(fair - 1),
        length=sum(lengths) / len(lengths) / size,
        expected=1 + (one - 1) * len(fair) / len(a),
        residuals=residuals,
    )


def dot(x: Tensor, y: Tensor) -> float:
    return float((x.double() * y.double()).sum())
