"""`efftune verify`: bias and variance of a recipe's gradients, measured on the user's own model and data."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

import efftune
from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.contracts import Keep
from efftune.measure import estimates
from efftune.measure.estimates import EstimateStatistics
from efftune.measure.fidelity import Fidelity, fidelity, gradients, negligible, sampled_entries
from efftune.memory import meter
from efftune.methods._base import Method, drawing_keeps
from efftune.nn.subbatch import Recompute
from efftune.optim.zeroth_order import ZerothOrderSGD
from efftune.random_state import set_seed
from efftune.train import processes, rundir
from efftune.train import run as runs
from efftune.train.loop import to_device
from efftune.train.task import Task, autocast


def verify(given: dict[str, Any], seeds: int = 32, batches: int = 8, max_bias: float = 0.02) -> list[Fidelity]:
    """Draws the gradient of one batch `seeds` times, compares it with the exact one, prints a table, and writes it as
    JSON where --out says so. Of a zeroth-order recipe, the batch's estimates along `seeds` steps' directions.

    Raises: EfftuneError (so that the program fails) where a gradient is biased: the bias is significant (one-sided,
    5 % for all parameters together) and more than `max_bias` of the gradient, or a gradient is not finite. What a
    method leaves out on purpose is measured in a row of its own, which passes.
    """
    if processes.launched() > 1:
        raise EfftuneError("verify measures in one process; start it without torchrun.")
    if seeds < 4 or batches < 2:
        raise EfftuneError("verify needs at least 4 seeds and 2 batches to tell a bias from noise.")
    config = runs.settings(given, Path(given.get("out") or "."))
    set_seed(config.seed)
    if config.objective != "loss":
        raise EfftuneError(
            f"--objective {config.objective} has no gradient to hold estimates against; verify them with the loss."
        )
    prepared = runs.prepare(config)
    set_seed(config.seed)
    tuner = efftune.apply(prepared.model, config.recipe, config.blocks)
    optimizer = tuner.optimizer(config.lr)
    estimated = isinstance(optimizer, ZerothOrderSGD)
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
    selecting = [method for method in tuner.methods if method.selects(tuner.run) is not None]
    whole = None
    with ExitStack() as stack:
        for method in selecting:
            stack.enter_context(method.exactly(tuner.run))
        # A few steps away from the start, where LoRA's B is zero and A has no gradient.
        with tuner.exactly() if not estimated else nullcontext():
            for batch in data[:4]:
                tuner.backward(batch, task.loss, 1.0 / max(1, task.terms(batch)))
                optimizer.step()
                optimizer.zero_grad()
        if isinstance(optimizer, ZerothOrderSGD):
            results, whole = estimates.measure(tuner, optimizer, task, data, seeds)
        else:
            results = measure(tuner, task, data, seeds)
    results += [selected(tuner, method, task, data) for method in selecting]
    print(table(results, max_bias, whole))
    if whole:
        print(whole)
    print(legend(results, max_bias, whole))
    for method in tuner.methods:
        if method.verified:
            print(method.verified)
    if given.get("out"):
        out = Path(given["out"])
        out.mkdir(parents=True, exist_ok=True)
        with rundir.writing(out):
            found = {"recipe": tuner.recipe, "seeds": seeds, "parameters": [asdict(r) for r in results]}
            found |= {"directions": asdict(whole)} if whole else {}
            rundir.write_atomically(out / "verify.json", json.dumps(plain(found), allow_nan=False) + "\n")
    judge(results, max_bias, whole)
    but = "".join(f", but for the choice of {method.name}, which is its purpose" for method in selecting)
    print(f"No gradient of '{tuner.recipe}' has a bias that is both significant and above {percent(max_bias)}{but}.")
    return results


def measure(tuner: efftune.Tuner, task: Task, data: list[Any], seeds: int) -> list[Fidelity]:
    """`data`: batches on the device; the first is the one that is drawn from, all give SGD's noise. A row for each
    parameter, and one for each kind of module that keeps codes for a derivative that is not linear in them: of all
    gradients, with everything else exact."""
    where = sampled_entries(tuner)

    def chosen(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: g.flatten()[where[name]].double().cpu() for name, g in gradients.items()}

    def drawn(turn: int) -> dict[str, Tensor]:
        found = gradients(tuner, task, data[0])
        for method in tuner.methods:
            if method.overrides("arrives"):
                found = {name: method.arrives(name, g, turn) for name, g in found.items()}
        return chosen(found)

    with tuner.exactly():
        exact = [chosen(gradients(tuner, task, batch)) for batch in data]
    draws = [drawn(turn) for turn in range(seeds)]
    least = negligible(exact[0])
    truth, others, rows = concatenated(exact[0]), torch.stack([concatenated(g) for g in exact]), []
    for kind, places in nonlinear_keeps(tuner.model).items():
        with tuner.exactly():
            for module, name, keep in places:
                vars(module)[name] = keep
            only = [concatenated(chosen(gradients(tuner, task, data[0]))) for _ in range(seeds)]
        errors = torch.stack(only) - truth
        rows.append(fidelity(f"all, by keeps of {kind} alone", errors, truth, others, 0, least * len(truth)))
    kept = meter.saved_for_backward(tuner.model, lambda: task.loss(tuner.model, data[0])).by_module
    return [
        fidelity(
            name,
            torch.stack([g[name] for g in draws]) - exact[0][name],
            exact[0][name],
            torch.stack([g[name] for g in exact]),
            kept.get(name.rpartition(".")[0], 0),
            least * len(exact[0][name]),
        )
        for name in where
    ] + rows


def selected(tuner: efftune.Tuner, method: Method, task: Task, data: list[Any]) -> Fidelity:
    """What `method` leaves out of the gradients of all batches, with everything else exact."""
    where = sampled_entries(tuner)

    def gradient(batch: Any) -> Tensor:
        found = gradients(tuner, task, batch)
        return torch.cat([found[name].flatten()[places].double().cpu() for name, places in where.items()])

    with tuner.exactly():
        exact = torch.stack([gradient(batch) for batch in data])
    with ExitStack() as stack:
        for other in tuner.methods:
            if other is not method:
                stack.enter_context(other.exactly(tuner.run))
        batches = cycle(data)
        while not method.selects(tuner.run):
            gradient(next(batches))
        found = torch.stack([gradient(batch) for batch in data])
    of_all = fidelity(f"all, by the choice of {method.name}", found - exact, exact.mean(dim=0), exact, 0)
    return replace(of_all, by_design=True)


def concatenated(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(gradients.values()))


def nonlinear_keeps(model: nn.Module) -> dict[str, list[tuple[nn.Module, str, Keep]]]:
    """Kind of module -> what draws in modules whose backward is not linear in what was kept, where it may be biased."""
    found: dict[str, list[tuple[nn.Module, str, Keep]]] = {}
    for module, name, keep in drawing_keeps(model):
        if not isinstance(module, Linear) and keep.restores:
            kind = " ".join([type(module).__name__, *filter(None, [getattr(module, "activation", None)])])
            found.setdefault(kind, []).append((module, name, keep))
    return found


def plain(value: Any) -> Any:
    """Returns the value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def highest_score(results: list[Fidelity], whole: EstimateStatistics | None) -> float:
    """What z may be for noise: beyond it in one of 20 measurements, of all rows that count together."""
    count = sum(not r.by_design for r in results) + (4 if whole else 0)  # these two have two sides
    return NormalDist().inv_cdf(1 - 0.05 / max(1, count))


def is_biased(r: Fidelity, limit: float, max_bias: float) -> bool:
    return not r.by_design and r.z > limit and r.bias > max_bias


def judge(results: list[Fidelity], max_bias: float, whole: EstimateStatistics | None = None) -> None:
    """Raises: EfftuneError where a result is biased or not finite."""
    broken = [r.name for r in results if not math.isfinite(r.error)]
    if broken:
        raise EfftuneError(f"The gradient of {broken[0]} is NaN or Inf.")
    limit = highest_score(results, whole)
    if whole and abs(whole.slope_z) > limit and abs(whole.slope - 1) > max_bias:
        raise EfftuneError(
            f"The differences of losses are {whole.slope:.2f} times the derivatives along their directions "
            f"(z = {whole.slope_z:.1f}, limit {limit:.1f}): eps is too large for this model or, in 16 bits, too small."
        )
    biased = [r for r in results if is_biased(r, limit, max_bias)]
    if biased:
        worst = max(biased, key=lambda r: r.bias)
        raise EfftuneError(
            f"{len(biased)} of {len(results)} gradients are biased; the most that of {worst.name}: {worst.bias:.1%} of "
            f"its norm (z = {worst.z:.1f}, limit {limit:.1f})."
        )
    if whole and abs(whole.fairness_z) > limit and abs(whole.fairness - 1) > max_bias:
        raise EfftuneError(
            f"Along the gradient the estimates have {whole.fairness:.2f} times its length (z = {whole.fairness_z:.1f}, "
            f"limit {limit:.1f}): the recipe draws some directions more often than others."
        )


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def table(results: list[Fidelity], max_bias: float, whole: EstimateStatistics | None = None) -> str:
    width, limit = max(len(r.name) for r in results), highest_score(results, whole)
    lines = [f"{'':{width}}  {'bias':>7}  {'z':>6}  {'error':>7}  {'var/SGD':>8}  {'kept KiB':>9}  {'var/byte':>8}"]
    for r in results:
        per_byte = "–" if r.variance_per_byte is None else f"{r.variance_per_byte:.1e}"
        error = f"{r.error:.2%}" if r.error < 10 else f"{r.error:,.0f} x"
        z = f"{r.z:.1f}" if r.z == r.z else "–"  # of 2 batches a row of a choice has none
        verdict = "  by design" if r.by_design else "  biased" if is_biased(r, limit, max_bias) else ""
        lines.append(
            f"{r.name:{width}}  {r.bias:7.2%}  {z:>6}  {error:>7}  {r.variance_to_sgd:8.2g}  "
            f"{r.kept / 1024:9.1f}  {per_byte:>8}{verdict}"
        )
    return "\n".join(lines)


def legend(results: list[Fidelity], max_bias: float, whole: EstimateStatistics | None = None) -> str:
    """Says what the columns are, in which unit, and when a row passes."""
    limit = f"{highest_score(results, whole):.1f}"
    lines = [
        "bias      length of the draws' mean error, noise taken off, in percent of the exact gradient's length",
        "z         how sure that bias is: normal with deviation 1 around 0 where there is none",
        "error     root mean square of a draw's error, in percent of that length, or (x) in multiples of it",
        "var/SGD   mean square of a draw's error / variance of the exact gradient from batch to batch",
        "kept KiB  what the parameter's module keeps of one batch for backward, in units of 1024 bytes",
        "var/byte  the square of error (as a share, not in percent) / kept bytes",
        f"A row passes where bias is at most {percent(max_bias)} or z at most {limit}, which noise alone exceeds "
        "in one of 20 tables.",
    ]
    if whole:
        lines.append(
            "bias and z are of the estimates minus what the same directions make of exact derivatives. The first two "
            f"lines below the table pass where they are within {percent(max_bias)} of 1, or z is at most {limit} "
            "either way."
        )
    return "\n".join(lines)
