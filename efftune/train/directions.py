"""How far the estimates of a zeroth-order recipe are from the gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from efftune.methods.zeroth_order._estimate import ZerothOrder
from efftune.optim.zeroth_order import ZerothOrderSGD
from efftune.train.fidelity import Fidelity, coordinates, fidelity, gradients, negligible, normal_score
from efftune.train.task import Task
from efftune.tuner import Tuner

Tensors = dict[str, Tensor]


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

    def __str__(self) -> str:
        return (
            f"over {self.entries:,} trained entries, of estimates a·z of the gradient g:\n"
            f"  a / <g, z>            {self.slope:.4f}, z {self.slope_z:.1f}, residual {self.residual:.2%}\n"
            f"  <estimate, g> / |g|²  {self.mean:.2f} ± {self.mean_error:.2f}, z {self.mean_z:.1f}\n"
            f"  |estimate|² / |g|²    {self.length:,.0f}, and {self.expected:,.0f} expected of exact derivatives"
        )


@torch.no_grad()
def measure(
    tuner: Tuner, optimizer: ZerothOrderSGD, task: Task, data: list[Any], steps: int
) -> tuple[list[Fidelity], Directions]:
    """Of the first batch's estimates in `steps` steps that the recipe would take from where it is. None is taken.

    What an estimate misses of the gradient is nearly all due to the draw, z·zᵀ for the identity, in which a bias would
    drown. So `bias` and `z` are of the estimates minus what the same draws make of exact derivatives, which has none.
    """
    where = coordinates(tuner)

    def chosen(tensors: Tensors) -> Tensors:
        return {name: tensors[name].flatten()[i].double().cpu() for name, i in where.items()}

    with tuner.exactly():
        exact = [chosen(meant(tuner, optimizer, task, batch)) for batch in data]
        target = meant(tuner, optimizer, task, data[0])
    scalars, lengths, along, errors, against = [], [], [], [], []
    for found, estimate, ideal in draws(tuner, optimizer, task, data[0], target, steps):
        scalars += found
        lengths.append(dot(estimate, estimate))
        along.append(dot(estimate, target))
        errors.append(chosen({name: estimate[name] - target[name] for name in where}))
        against.append(chosen({name: estimate[name] - ideal[name] for name in where}))

    results, least = [], negligible(exact[0])
    for name in where:
        batches = torch.stack([t[name] for t in exact])
        total, own = (
            fidelity(name, torch.stack([e[name] for e in of]), batches[0], batches, 0, least * len(where[name]))
            for of in (errors, against)
        )
        results.append(replace(total, bias=own.bias, z=own.z))
    parameters = {name: p for name, p in tuner.named_trained().items() if name in where}
    along = torch.tensor(along, dtype=torch.float64)
    return results, summary(optimizer, parameters, target, scalars, along, sum(lengths) / steps)


def meant(tuner: Tuner, optimizer: ZerothOrderSGD, task: Task, batch: Any) -> Tensors:
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
    tuner: Tuner, optimizer: ZerothOrderSGD, task: Task, batch: Any, target: Tensors, steps: int
) -> Iterator[tuple[list[tuple[float, float]], Tensors, Tensors]]:
    """Step by step: for each of its directions a and the exact derivative, both as the method weights them; the
    estimate; and the one that the exact derivatives would give."""
    method = next(m for m in tuner.methods if isinstance(m, ZerothOrder))
    parameters = tuner.named_trained()
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
        moved = [name for name in target if id(parameters[name]) in used]

        def along(seed: int, moved=moved) -> float:
            z = {name: optimizer.estimate(name, parameters[name], {seed: 1.0}) for name in moved}  # times u, as t is
            return sum(dot({name: z[name]}, target) / optimizer.unscaled(name) ** 2 for name in moved)

        exact = {seed: weights[seed] * along(seed) for seed in a}
        estimate = {name: torch.zeros_like(t) for name, t in target.items()}
        ideal = dict(target)  # of what is not perturbed, where the estimate is zero
        for name in moved:
            estimate[name] = optimizer.estimate(name, parameters[name], a)
            ideal[name] = optimizer.estimate(name, parameters[name], exact)
        yield [(a[seed], exact[seed]) for seed in a], estimate, ideal
    tuner.step = start
    optimizer.zero_grad()


def summary(
    optimizer: ZerothOrderSGD,
    parameters: dict[str, nn.Parameter],
    target: Tensors,
    scalars: list[tuple[float, float]],
    along: Tensor,
    length: float,
) -> Directions:
    """along (steps,) <estimate, t>."""
    a, exact = torch.tensor(scalars, dtype=torch.float64).unbind(1)
    size, steps, squares = dot(target, target), len(along), exact.square().sum()
    fair = along / size
    # One direction: E‖u∘z·<v, z>‖² with t = u∘v, for ±1 draws Σ u²·‖v‖², for normal ones 2‖t‖² more.
    entries = {name: int(small(optimizer, name, p).sum()) for name, p in parameters.items()}
    v = sum(dot({name: t}, target) / optimizer.unscaled(name) ** 2 for name, t in target.items())
    one = v * sum(entries[name] * optimizer.unscaled(name) ** 2 for name in target) / size
    one += 2 if optimizer.dist == "normal" else 0
    return Directions(
        entries=sum(entries.values()),
        slope=float((a * exact).sum() / squares),
        slope_z=normal_score((a - exact) * exact),
        residual=float(((a - exact).square().sum() / squares).sqrt()),
        mean=float(fair.mean()),
        mean_error=float(fair.std() / steps**0.5),
        mean_z=normal_score(fair - 1),
        length=length / size,
        expected=(one - 1) * steps / len(a) + 1,
    )


def dot(x: Tensors, y: Tensors) -> float:
    return sum(float((t.double() * y[name].double()).sum()) for name, t in x.items())
