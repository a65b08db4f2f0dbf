"""`efftune verify`: bias and variance of a recipe's gradients, measured on the user's own model and data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

import efftune
from efftune.errors import EfftuneError
from efftune.memory import meter
from efftune.nn.subbatch import Recompute
from efftune.optim.zeroth_order import ZerothOrderSGD
from efftune.train import run as runs
from efftune.train import rundir, state
from efftune.train.loop import to_device
from efftune.train.task import Task, autocast

COORDINATES = 4096  # of each parameter's gradient are looked at, drawn once
NEGLIGIBLE = 1e-3  # of the model's typical gradient entry


@dataclass
class Fidelity:
    """Of one parameter's gradient, over the coordinates that were looked at."""

    name: str
    z: float  # of the bias, one-sided: noise alone is standard normal
    bias: float  # ‖E[g] - g*‖ / ‖g*‖, at least 0
    error: float  # √E‖g - g*‖² / ‖g*‖
    variance_to_sgd: float  # E‖g - g*‖² / variance of g* from batch to batch
    kept: int  # bytes that the parameter's module keeps for backward
    variance_per_byte: float | None  # error² / kept


def verify(given: dict[str, Any], seeds: int = 32, batches: int = 8, max_bias: float = 0.02) -> list[Fidelity]:
    """Draws the gradient of one batch `seeds` times, compares it with the exact one, prints a table, and writes it as
    JSON where --out says so.

    Raises: EfftuneError (so that the program fails) where a gradient is biased: the bias is significant (one-sided,
    5 % for all parameters together) and more than `max_bias` of the gradient, or a gradient is not finite.
    """
    if seeds < 4 or batches < 2:
        raise EfftuneError("verify needs at least 4 seeds and 2 batches to tell a bias from noise.")
    config = runs.settings(given, Path(given.get("out") or "."))
    state.set_seed(config.seed)
    prepared = runs.prepare(config)
    state.set_seed(config.seed)
    tuner = efftune.apply(prepared.model, config.recipe, config.blocks)
    optimizer = tuner.optimizer(config.lr)
    if isinstance(optimizer, ZerothOrderSGD):
        raise EfftuneError(
            f"'{tuner.recipe}' leaves no gradients to look at; verify measures recipes with a backward pass."
        )
    model = tuner.model.eval()  # without dropout: all seeds draw from one and the same function
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Recompute):
            module.training = True  # or a block would not draw its samples; of itself alone, not of what is inside
    device = next(model.parameters()).device
    task = autocast(prepared.task, device.type) if config.dtype == "mixed" else prepared.task
    rows = prepared.train.rows(0)[: batches * config.batch_size]
    data = [to_device(batch, device) for batch in prepared.train.batches(rows, config.batch_size)]
    if len(data) < 2:
        raise EfftuneError(
            "verify needs data for at least 2 batches: SGD's own noise is what variance is held against."
        )
    with tuner.exactly():  # a few steps away from the start, where LoRA's B is zero and A has no gradient
        for batch in data[:4]:
            tuner.backward(batch, task.loss, 1.0 / max(1, task.terms(batch)))
            optimizer.step()
            optimizer.zero_grad()
    results = measure(tuner, task, data, seeds)
    print(table(results))
    if given.get("out"):
        out = Path(given["out"])
        out.mkdir(parents=True, exist_ok=True)
        with rundir.writing(out):
            text = json.dumps({"recipe": tuner.recipe, "seeds": seeds, "parameters": [asdict(r) for r in results]})
            rundir.write_atomically(out / "verify.json", text + "\n")
    judge(results, max_bias)
    print(f"No gradient of '{tuner.recipe}' has a bias that is both significant and above {max_bias:.0%}.")
    return results


def measure(tuner: efftune.Tuner, task: Task, data: list[Any], seeds: int) -> list[Fidelity]:
    """`data`: batches on the device; the first is the one that is drawn from, all give SGD's noise."""
    parameters = {n: p for n, p in tuner.named_trained().items() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    where = {
        name: torch.randperm(p.numel(), generator=generator)[:COORDINATES].to(p.device)
        for name, p in parameters.items()
    }

    def gradient(batch: Any) -> dict[str, Tensor]:
        for p in parameters.values():
            p.grad = None
        tuner.backward(batch, task.loss, 1.0 / max(1, task.terms(batch)))
        found = {}
        for name, p in parameters.items():
            flat = torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.flatten()
            found[name] = flat[where[name]].double().cpu()
            p.grad = None
        return found

    with tuner.exactly():
        exact = [gradient(batch) for batch in data]
    drawn = [gradient(data[0]) for _ in range(seeds)]
    entries = torch.cat(list(exact[0].values()))
    # A gradient that is zero but for rounding (a key's bias under softmax) has no relative error to speak of.
    negligible = NEGLIGIBLE**2 * float(entries.square().mean())
    kept = meter.saved_for_backward(tuner.model, lambda: task.loss(tuner.model, data[0])).by_module
    return [
        fidelity(
            name,
            torch.stack([g[name] for g in drawn]) - exact[0][name],
            exact[0][name],
            torch.stack([g[name] for g in exact]),
            kept.get(name.rpartition(".")[0], 0),
            negligible * len(exact[0][name]),
        )
        for name in parameters
    ]


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
    """Student's t of the mean of `values`, as the standard normal number of the same tail (Wallace 1959)."""
    mean, deviation, freedom = float(values.mean()), float(values.std()), len(values) - 1
    if deviation == 0.0:
        return math.copysign(math.inf, mean) if mean else 0.0
    t = mean / deviation * math.sqrt(len(values))
    z = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
    return math.copysign(z, t)


def judge(results: list[Fidelity], max_bias: float) -> None:
    """Raises: EfftuneError where a result is biased or not finite."""
    broken = [r.name for r in results if not math.isfinite(r.error)]
    if broken:
        raise EfftuneError(f"The gradient of {broken[0]} is NaN or Inf.")
    limit = NormalDist().inv_cdf(1 - 0.05 / len(results))
    biased = [r for r in results if r.z > limit and r.bias > max_bias]
    if biased:
        worst = max(biased, key=lambda r: r.bias)
        raise EfftuneError(
            f"{len(biased)} of {len(results)} gradients are biased; the most that of {worst.name}: {worst.bias:.1%} of "
            f"its norm (z = {worst.z:.1f}, limit {limit:.1f})."
        )


def table(results: list[Fidelity]) -> str:
    width = max(len(r.name) for r in results)
    lines = [f"{'':{width}}  {'bias':>7}  {'z':>6}  {'error':>7}  {'var/SGD':>8}  {'kept KiB':>9}  {'var/byte':>8}"]
    for r in results:
        per_byte = "–" if r.variance_per_byte is None else f"{r.variance_per_byte:.1e}"
        lines.append(
            f"{r.name:{width}}  {r.bias:7.2%}  {r.z:6.1f}  {r.error:7.2%}  {r.variance_to_sgd:8.2g}  "
            f"{r.kept / 1024:9.1f}  {per_byte:>8}"
        )
    return "\n".join(lines)
