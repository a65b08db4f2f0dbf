"""`efftune compare`: the same training under several recipes, side by side."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import efftune
from efftune.errors import EfftuneError
from efftune.memory import meter
from efftune.random_state import set_seed
from efftune.train import processes, report, rundir
from efftune.train import run as runs
from efftune.train.loop import to_device
from efftune.train.task import autocast

COLUMNS = {
    "recipe": "recipe", "train_loss": "training loss", "eval_loss": "held-out loss", "eval_accuracy": "accuracy",
    "saved": "saved bytes/token", "peak": "peak of a step, MiB", "tokens_per_s": "tokens read/s",
}  # fmt: skip


def compare(recipes: list[str], given: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains once for each recipe, with the same data, seed and settings, and writes compare.md, compare.json and
    compare.png into the run directory, in which each recipe has a run directory of its own.

    Saved bytes are what backward keeps of one batch besides parameters; the peak is what one forward and backward pass
    allocate above the model. Tokens read/s is the median step's, and counts those of rows that a recipe leaves out.
    """
    if len(set(recipes)) < 2:
        raise EfftuneError("compare takes at least two different recipes.")
    if given.get("resume"):
        raise EfftuneError("compare cannot resume; continue one of its runs with efftune train --resume --out RUN.")
    if processes.launched() > 1:
        raise EfftuneError("compare trains in one process; start it without torchrun.")
    out = rundir.choose(given.get("out"), resume=False, kind="compare")
    measured = [memory(recipe, given) for recipe in recipes]  # what cannot be applied refuses before the first run
    out = rundir.create(out, numbered=not given.get("out"), kind="compare")
    rows = []
    for number, (recipe, bytes_) in enumerate(zip(recipes, measured, strict=True)):
        folder = out / f"{number}-{re.sub('[^a-z0-9]+', '-', recipe.lower()).strip('-')}"
        after = runs.train({**given, "recipe": recipe, "out": str(folder)})["after"]
        records = rundir.RunDir(folder, resumed=False).records()
        steps = [r for r in records if "loss" in r]
        last = [r["loss"] for r in steps[-max(1, len(steps) // 10) :]]
        rows.append(
            {
                "recipe": recipe, "train_loss": statistics.fmean(last), **_evaluations(after), **bytes_,
                "tokens_per_s": statistics.median(r["tokens_per_s"] for r in steps), "records": records,
            }
        )  # fmt: skip
    with rundir.writing(out):
        text = table(rows)
        rundir.write_atomically(out / "compare.md", text)
        plain = [{name: value for name, value in row.items() if name != "records"} for row in rows]
        rundir.write_atomically(out / "compare.json", json.dumps(plain, indent=2) + "\n")
        (out / "compare.png").write_bytes(report.comparison(rows, given.get("objective", "loss")))
    print(f"\n{text}\n{out}/compare.png shows the loss curves.")
    return rows


def _evaluations(after: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in after.items() if name.startswith("eval_")}


def memory(recipe: str, given: dict[str, Any]) -> dict[str, float]:
    """Measures what one batch costs under `recipe`."""
    config = runs.settings({**given, "recipe": recipe}, Path("."))
    set_seed(config.seed)
    prepared = runs.prepare(config)
    tuner = efftune.apply(prepared.model, config.recipe, config.blocks)
    tuner.model.train()
    tuner.optimizer(config.lr)
    device = next(tuner.model.parameters()).device
    task = autocast(prepared.task, device.type) if config.dtype == "mixed" else prepared.task
    batch = next(prepared.train.batches(prepared.train.rows(0)[: config.batch_size], config.batch_size))
    batch = to_device(batch, device)
    tokens = batch["input_ids"].numel()
    kept: list[int] = []
    tuner.backward(batch, meter.counting(task.loss, kept))
    _, peak = meter.allocated(lambda: tuner.backward(batch, task.loss), device)
    return {"saved": max(kept) / tokens, "peak": peak / 2**20}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown."""
    metrics = {name: name.removeprefix("eval_") for row in rows for name in row if name.startswith("eval_")}
    columns = COLUMNS | {name: title for name, title in metrics.items() if name not in COLUMNS}
    titles = {name: title for name, title in columns.items() if any(name in row for row in rows)}
    lines = ["| " + " | ".join(titles.values()) + " |", "|" + " --- |" * len(titles)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(name, row.get(name)) for name in titles) + " |")
    return "\n".join(lines) + "\n"


def _cell(name: str, value: Any) -> str:
    if name == "recipe":
        return f"`{value}`"
    if value is None:
        return "–"
    return f"{value:,.0f}" if name in ("saved", "tokens_per_s") else f"{value:.4g}"
