"""How far estimates of a gradient are from it: bias, error, variance, and whether the bias is there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efftune.train.task import Task
from efftune.tuner import Tuner

COORDINATES = 4096  # of each parameter's gradient are looked at, drawn once
NEGLIGIBLE = 1e-3  # of the model's typical gradient entry


@dataclass
class Fidelity:
    """How far one parameter's gradient is from the exact one g*, over a sample of its entries."""

    name: str
    z: float  # of the bias, one-sided: noise alone is standard normal
    bias: float  # ‖E[g] - g*‖ / ‖g*‖, at least 0
    error: float  # √E‖g - g*‖² / ‖g*‖
    variance_to_sgd: float  # E‖g - g*‖² / variance of g* from batch to batch
    kept: int  # bytes that the parameter's module keeps for backward
    variance_per_byte: float | None  # error² / kept
    by_design: bool = False  # whether a bias is the purpose, so that it passes


def sampled_entries(tuner: Tuner) -> dict[str, Tensor]:
    """The name of each parameter that trains, and the indices of the entries that are looked at, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randperm(p.numel(), generator=generator)[:COORDINATES].to(p.device)
        for name, p in tuner.named_trained().items()
        if p.requires_grad
    }


def gradients(tuner: Tuner, task: Task, batch: Any) -> dict[str, Tensor]:
    """The gradients of the mean loss of a batch with respect to all that trains, by name; zeros where there is none."""
    parameters = {n: p for n, p in tuner.named_trained().items() if p.requires_grad}
    for p in parameters.values():
        p.grad = None
    tuner.backward(batch, task.loss, 1.0 / max(1, task.terms(batch)))
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found


def negligible(exact: dict[str, Tensor]) -> float:
    """The square of an entry that counts for nothing: a gradient that is zero but for rounding (a key's bias under
    softmax) has no relative error to speak of."""
    return NEGLIGIBLE**2 * float(torch.cat(list(exact.values())).square().mean())


def fidelity(name: str, errors: Tensor, exact: Tensor, batches: Tensor, kept: int, least: float = 0.0) -> Fidelity:
    """errors (seeds, C), exact (C,), batches (batches, C), all float64; ‖exact‖² counts as `least` at least.

    The squared bias ‖E[e]‖² is estimated without bias by the mean of ⟨e_s, e_t⟩ over pairs s ≠ t. Whether it is there
    is told by halves: the mean error of the first half of the draws gives a direction, along which the errors of the
    second half have mean zero if there is no bias, whatever their distribution in all other directions.
    """
    n = len(errors)
    gram = errors @ errors.t()
    squared_bias = float(gram[~torch.eye(n, dtype=torch.bool)].mean())
    along = errors[n // 2 :] @ errors[: n // 2].mean(dim=0)
    size, error = max(least, float(exact.square().sum())), float(gram.diagonal().mean())
    noise = float(batches.var(dim=0, unbiased=True).sum())
    return Fidelity(
        name,
        z=normal_score(along),
        bias=math.sqrt(max(0.0, squared_bias) / size) if size else 0.0,
        error=math.sqrt(error / size) if size else 0.0,
        variance_to_sgd=error / noise if noise else 0.0,
        kept=kept,
        variance_per_byte=error / size / kept if kept and size else None,
    )


def normal_score(values: Tensor) -> float:
    """Student's t of the mean of `values`, as the standard normal number of the same tail (Wallace 1959); NaN of
    one value."""
    if len(values) < 2:
        return math.nan
    mean, deviation, freedom = float(values.mean()), float(values.std()), len(values) - 1
    if deviation == 0.0:
        return math.copysign(math.inf, mean) if mean else 0.0
    t = mean / deviation * math.sqrt(len(values))
    z = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
    return math.copysign(z, t)
