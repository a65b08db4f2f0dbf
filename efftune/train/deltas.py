"""`efftune delta`: what runs with sparse recipes trained, thinned out, added up, and written as something else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

import efftune
from efftune.errors import EfftuneError
from efftune.interop.changes import check, files, masked, put, ternary, total
from efftune.interop.peft import endings
from efftune.interop.sparse import Changes, dtypes, entries_as
from efftune.interop.svd import save_lora
from efftune.linear import Linear
from efftune.linear.delta.columns import above
from efftune.methods.sparse.shira import Shira
from efftune.train import default_job, models, rundir
from efftune.tuner import Tuner

DEFAULT = "default"  # as a model: the small one of `efftune train` without options
LOADED = {"bfloat16": "bf16", "float32": "float32"}


@dataclass(frozen=True)
class Edit:
    """What each folder goes through: see `masked` and `ternary` in interop/changes.py. alpha None: sizes stay."""

    keep: float | None = None
    drop_largest: float = 0.0
    alpha: float | None = None

    def __post_init__(self):
        check(self.keep, self.drop_largest, 1.0 if self.alpha is None else self.alpha)

    def __call__(self, changes: Changes) -> Changes:
        left = masked(changes, self.keep, self.drop_largest)
        return left if self.alpha is None else ternary(left, self.alpha, of=changes)


@dataclass
class Report:
    entries: int
    layers: int
    errors: dict[str, float] = field(default_factory=dict)  # of an approximation: see `save_lora`


def delta(
    base: str, add: list[str], subtract: list[str], edit: Edit, out: Path, kind: str = "sparse", rank: int = 16
) -> Report:
    """Writes the sum of what is left of several folders to `out`: as "sparse", "model", "shira" or "lora".

    Args:
        base: folder or Hugging Face name of the model that the runs began with, or "default".
    Raises: EfftuneError, before anything is written. See `interop.changes.compose`.
    """
    if not base:
        raise EfftuneError("Give the model that the runs began with as --model; 'default' means the small one.")
    found = {dtype for file in files([*add, *subtract]) for dtype in dtypes(file)}
    if len(found) != 1 or not found <= LOADED.keys():
        raise EfftuneError(
            f"The files are of weights in {', '.join(sorted(found))}, and a model is loaded here in one dtype, "
            "bfloat16 or float32; load it yourself and use efftune.interop.changes.compose."
        )
    name = str(default_job.small_model()) if base == DEFAULT else base
    models.check_folder(name)
    tokenizer = models.load_tokenizer(name)
    model, _ = models.load_model(name, LOADED[found.pop()], None, tokenizer.pad_token_id)
    changes = total(model, add, subtract, edit)
    report = Report(sum(len(of.where) for of in changes.values()), len(changes))
    with rundir.writing(out), models.quiet():
        if kind == "model":
            plain: Any = put(model, changes)
            plain.save_pretrained(out)
            tokenizer.save_pretrained(out)
        elif kind == "lora":
            report.errors = save_lora(tuned(model, changes), out, rank)
        else:
            tuned(model, changes).save(out, kind)
    return report


def tuned(model: nn.Module, changes: dict[str, Changes]) -> Tuner:
    """The tuner of a `shira` that has trained just this."""
    shares = [len(of.where) / (of.shape[0] * of.shape[1]) for of in changes.values()]
    least = [1 / (of.shape[0] * of.shape[1]) for of in changes.values()]  # of which some entry is one
    density = float(f"{max(sum(shares) / len(shares), *least):.3g}")
    targets = endings(model, set(changes))
    recipe = Shira(density, target_modules=targets if isinstance(targets, str) else tuple(targets), modules_to_save=())
    tuner = efftune.apply(model, recipe, blocks=False)
    for name, (_, where, original, change) in changes.items():
        layer = cast(Linear, tuner.model.get_submodule(name))
        found = entries_as(layer, where, change.to(above(original.dtype)))
        layer.replace(tuple([found[part] for part in layer.delta.names]))
    return tuner
