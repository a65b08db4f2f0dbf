"""How far the estimates of a zeroth-order recipe are from the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.measure.fidelity import Fidelity, fidelity, gradients, negligible, normal_score, sampled_entries
from efftune.methods.zeroth_order._estimate import ZerothOrder
from efftune.optim.zeroth_order import ZerothOrderSGD
from efftune.train.task import Task
from efftune.tuner import Tuner

FACTORS = (0.01, 0.1, 0.3, 1, 3, 10, 100)  # of ε, at which a few steps are looked at
FEW = 8


@dataclass
class EstimateStatistics:
    """Statistics of a zeroth-order recipe's gradient estimates a·z against the exact gradient g, s·g with per_layer."""

    entries: int  # that train
    slope: float  # Σ a·<g, z> / Σ <g, z>², with the exact derivative <g, z>: 1, but for O(ε²)
    slope_z: float  # of slope - 1
    residual: float  # rms(a - <g, z>) / rms(<g, z>): that error, and the rounding of weights and losses
    fairness: float  # mean of <g, z>² / ‖g‖²: 1 if all directions are drawn alike
    fairness_error: float  # its standard error if they are
    fairness_z: float  # of fairness - 1
    length: float  # mean of ‖estimate‖² / ‖t‖², with t what the estimate's mean is to be
    expected: float  # which exact derivatives along independent directions would give it: d + 2 for one normal one
    residuals: dict[float, float]  # by ε, of a few steps each

    def __str__(self) -> str:
        return (
            f"over {self.entries:,} trained entries, of estimates a·z of the gradient g:\n"
            f"  a / <g, z>           {self.slope:.4f}, z {self.slope_z:.1f}, residual {self.residual:.2%}\n"
            f"  <g, z>² / |g|²       {self.fairness:.2f} ± {self.fairness_error:.2f}, z {self.fairness_z:.1f}\n"
            f"  |estimate|² / |g|²   {self.length:,.0f}; {self.expected:,.0f} expected of exact derivatives\n"
            f"  residual by eps      {'  '.join(f'{eps:.1e}: {r:.1%}' for eps, r in self.residuals.items())}"
        )


@dataclass
class Draw:
    """One direction of a step, its estimate and the exact derivative along it."""

    weight: float  # of its estimate in the step's mean
    a: float  # weighted
    exact: float  # <g, z>, not weighted


@torch.no_grad()
def measure(
    tuner: Tuner, optimizer: ZerothOrderSGD, task: Task, data: list[Any], steps: int
) -> tuple[list[Fidelity], EstimateStatistics]:
    """Measures the first batch's estimates in `steps` steps that the recipe would take from where it is. None is
    taken, but what the recipe learns from losses it has then learnt.

    What an estimate misses of the gradient is nearly all due to the draw, z·zᵀ for the identity, in which a bias would
    drown. So `bias` and `z` are of the estimates minus what the same draws make of exact derivatives, which has none.
    Raises: EfftuneError where the gradient of the first batch is zero.
    """
    where, parameters = sampled_entries(tuner), tuner.named_trained()

    def chosen(name: str, t: Tensor) -> Tensor:
        return t.flatten()[where[name]].double().cpu()

    exact, target = [], {}
    with tuner.exactly():
        for batch in reversed(data):
            target = expected_estimate(tuner, optimizer, task, batch)
            exact.insert(0, {name: chosen(name, t) for name, t in target.items()})
    if not any(t.any() for t in target.values()):
        raise EfftuneError("The gradient of the first batch is zero, so there is nothing to hold estimates against.")
    every, lengths = [], []
    errors, against = {name: [] for name in where}, {name: [] for name in where}
    for drawn, used in draws(tuner, optimizer, task, data[0], target, steps):
        every += drawn.values()
        lengths.append(0.0)
        a = {seed: draw.a for seed, draw in drawn.items()}
        derivatives = {seed: draw.weight * draw.exact for seed, draw in drawn.items()}
        for name, t in target.items():
            estimate, ideal = torch.zeros_like(t), t  # of what is not perturbed
            if id(parameters[name]) in used:
                p = parameters[name]
                estimate, ideal = (optimizer.directions.estimate(name, p, by_seed) for by_seed in (a, derivatives))
            lengths[-1] += dot(estimate, estimate)
            errors[name].append(chosen(name, estimate - t))
            against[name].append(chosen(name, estimate - ideal))

    results, least = [], negligible(exact[0])
    for name in where:
        batches = torch.stack([t[name] for t in exact])
        total, beyond_draws = (
            fidelity(name, torch.stack(of[name]), batches[0], batches, 0, least * len(where[name]))
            for of in (errors, against)
        )
        results.append(replace(total, bias=beyond_draws.bias, z=beyond_draws.z))
    residuals = {}
    for factor in FACTORS:
        with scaled(tuner, factor) as eps:
            few = draws(tuner, optimizer, task, data[0], target, min(steps, FEW))
            residuals[eps] = residual([draw for drawn, _ in few for draw in drawn.values()])
    return results, statistics(zeroth_order_method(tuner), optimizer, parameters, target, every, lengths, residuals)


def zeroth_order_method(tuner: Tuner) -> ZerothOrder:
    return next(m for m in tuner.methods if isinstance(m, ZerothOrder))


@contextmanager
def scaled(tuner: Tuner, factor: float) -> Iterator[float]:
    """Within it the recipe takes `factor` times its ε, which it yields."""
    methods, eps = tuner.methods, factor * zeroth_order_method(tuner).eps
    tuner.methods = [replace(m, eps=eps) if isinstance(m, ZerothOrder) else m for m in methods]
    try:
        yield eps
    finally:
        tuner.methods = methods


def residual(draws: list[Draw]) -> float:
    missed = sum((draw.a - draw.weight * draw.exact) ** 2 for draw in draws)
    squares = sum((draw.weight * draw.exact) ** 2 for draw in draws)
    return math.sqrt(missed / squares) if squares else math.nan  # nothing is perturbed


def expected_estimate(tuner: Tuner, optimizer: ZerothOrderSGD, task: Task, batch: Any) -> dict[str, Tensor]:
    """The exact gradient, scaled and masked as the estimator's expectation is. Called within `tuner.exactly()`."""
    parameters = tuner.named_trained()
    with torch.enable_grad():
        found = gradients(tuner, task, batch)
    for name, g in found.items():
        factor = optimizer.directions.scale(name) * optimizer.directions.inverse_scale(name)
        t = g.to(torch.promote_types(g.dtype, torch.float32)) * factor
        found[name] = torch.where(trained_entries(optimizer, name, parameters[name]), t, 0.0)
    return found


def trained_entries(optimizer: ZerothOrderSGD, name: str, w: Tensor) -> Tensor:
    """A mask of the entries of w that train: all of them without sparsity."""
    threshold = optimizer.directions.threshold(name, w)
    return torch.ones_like(w, dtype=torch.bool) if threshold is None else w.abs() <= threshold


def draws(
    tuner: Tuner, optimizer: ZerothOrderSGD, task: Task, batch: Any, target: dict[str, Tensor], steps: int
) -> Iterator[tuple[dict[int, Draw], set[int]]]:
    """Yields for each step its draws by seed, and the ids of the parameters that are perturbed."""
    method, parameters, start = zeroth_order_method(tuner), tuner.named_trained(), tuner.step
    looks = 1 if method.points == 1 else 0  # before the first difference
    for tuner.step in range(start - looks, start + steps):
        optimizer.zero_grad()
        tuner.backward(batch, task.loss, 1.0 / max(1, task.terms(batch)))
        optimizer.scalars.end_losses()
        if tuner.step < start:
            continue
        weights, pending = method.weights(tuner.run), optimizer.scalars.pending
        used = {i for _, ids in pending.values() for i in ids}
        drawn = {seed: Draw(weights[seed], float(a), 0.0) for seed, (a, _) in pending.items()}
        for name in (name for name in target if id(parameters[name]) in used):
            for seed, draw in drawn.items():  # u·z and t have a factor u each, which <g, s·z> has not
                z = optimizer.directions.estimate(name, parameters[name], {seed: 1.0})
                draw.exact += dot(z, target[name]) / optimizer.directions.inverse_scale(name) ** 2
        yield drawn, used
    tuner.step = start
    optimizer.zero_grad()


def statistics(
    method: ZerothOrder,
    optimizer: ZerothOrderSGD,
    parameters: dict[str, nn.Parameter],
    target: dict[str, Tensor],
    draws: list[Draw],
    lengths: list[float],
    residuals: dict[float, float],
) -> EstimateStatistics:
    """Returns the statistics of all draws; `lengths` has ‖estimate‖² of each step."""
    weight, a, exact = torch.tensor([(d.weight, d.a, d.exact) for d in draws], dtype=torch.float64).unbind(1)
    ideal = weight * exact
    u = {name: optimizer.directions.inverse_scale(name) for name in target}
    entries = {name: int(trained_entries(optimizer, name, parameters[name]).sum()) for name in target}
    # t = u∘v. One direction: E‖u∘z·<v, z>‖² is Σ u²·‖v‖² for ±1 draws, and 2‖t‖² more for normal ones.
    size, v = (sum(dot(t, t) / u[name] ** power for name, t in target.items()) for power in (0, 2))
    one = v / size * sum(entries[name] * u[name] ** 2 for name in target) + 2 * (optimizer.directions.dist == "normal")
    fairness = float((ideal * exact).sum()) / len(lengths) / v
    freedom = float(weight.sum() ** 2 / weight.square().sum())
    return EstimateStatistics(
        entries=sum(entries.values()),
        slope=float((a * ideal).sum() / ideal.square().sum()),
        slope_z=normal_score((a - ideal) * ideal),
        residual=residual(draws),
        fairness=fairness,
        fairness_error=math.sqrt(2 / freedom),
        fairness_z=score_of_squares(fairness, freedom),
        length=sum(lengths) / len(lengths) / size,
        expected=1 + (one - 1) / method.samples,
        residuals=residuals,
    )


def score_of_squares(mean: float, freedom: float) -> float:
    """The mean of `freedom` squares of standard normal numbers, as the standard normal number of the same tail (Wilson
    and Hilferty 1931). Of ±1 draws, whose <g, z> is not quite normal and varies less, it is on the safe side."""
    spread = 2 / (9 * freedom)
    return (mean ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def dot(x: Tensor, y: Tensor) -> float:
    return float((x.double() * y.double()).sum())
