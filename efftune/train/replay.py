"""A run as a file of seeds and scalars, and the model made from it and its base again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import efftune
from efftune.errors import EfftuneError
from efftune.interop import peft
from efftune.methods.zeroth_order.ferret import Ferret
from efftune.optim.seed_log import SeedLog, fingerprint
from efftune.optim.zeroth_order import ZerothOrderSGD
from efftune.random_state import set_seed
from efftune.train import checkpoint, default_job, run, rundir
from efftune.train.config import TrainConfig
from efftune.train.models import quiet
from efftune.tuner import CLOCK

DEFAULT = "default"  # as a base: the small model of `efftune train` without options
KEPT = ("dtype", "seed", "blocks", "seq_len")  # settings that decide what a model is before training


def export_log(source: str, out: Path) -> tuple[int, int]:
    """Writes the seed log of the run directory `source`, as its newest checkpoint has it. Returns how many scalars it
    has, and how many steps of the run are not in it: of a round that had not come to its end.

    Raises: EfftuneError where the recipe leaves no seeds, or the log ended before the run did.
    """
    path, config, labels = run.finished_settings(source)
    step, _, rest = checkpoint.load(path, {})
    optimizer = rest["optimizer"]
    states = [optimizer.get("zeroth_order", {}), *optimizer.get(CLOCK, {}).get("methods", {}).values()]
    states += rest.get("tuner", {}).get("methods", [])  # of a version whose optimizers did not carry it
    logged = next((state for state in states if "log" in state), None)
    if logged is None:
        raise EfftuneError(
            f"{source} was trained with '{config.recipe}', which leaves no seeds; export it without --seed-log."
        )
    if logged["log"] is None:
        raise EfftuneError(
            f"The seed log of {source} ended before the run: it would be longer than the weights, or a router sent "
            "steps too many different ways; export it without --seed-log."
        )
    log = SeedLog()
    log.load_state_dict(logged["log"])
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"recipe": config.recipe, "base": logged["base"], "labels": labels}
    log.save(out, about | {name: getattr(config, name) for name in KEPT})
    last = int(log.entries["step"][-1]) + 1 if len(log.entries) else 0
    return log.count, step - last if logged.get("moved") else 0


def replay(base: str, log_file: str, out: Path) -> dict[str, Any]:
    """Makes the model that a seed log describes: a PEFT adapter for LoRA, else a plain Hugging Face checkpoint.

    Args:
        base: folder or Hugging Face name of the model that the run began with, or "default".
    Returns: what the log says about itself, and "replayed": how many scalars were there.
    Raises: EfftuneError for a file that is no seed log, and for another base than the run's.
    """
    if not base:
        raise EfftuneError("Give the model that the run began with; 'default' means the small one.")
    log, about = SeedLog.load(log_file)
    missing = [name for name in (*KEPT, "recipe", "base", "labels") if name not in about]
    if missing:
        raise EfftuneError(f"{log_file} does not say '{missing[0]}'; efftune export --seed-log writes logs that do.")
    settings = {name: about[name] for name in KEPT}
    model_name = str(default_job.small_model()) if base == DEFAULT else base
    config = TrainConfig(model=model_name, recipe=about["recipe"], **settings)
    set_seed(config.seed)
    model, tokenizer, _ = run.load(config, about["labels"])
    set_seed(config.seed)
    tuner = efftune.apply(model, config.recipe, config.blocks)
    ferret = next((method for method in tuner.methods if isinstance(method, Ferret)), None)
    player: Any = ferret or tuner.optimizer(lr=0.0)
    parts = "only" if ferret else "group"
    if not isinstance(player, Ferret | ZerothOrderSGD) or any(parts not in part for part in log.parts):
        raise EfftuneError(f"{log_file} is damaged: its recipe '{config.recipe}' leaves no such log.")
    if fingerprint(tuner.model) != about["base"]:
        raise EfftuneError(f"{base} is not the model that {log_file} began with: nothing was replayed.")
    if isinstance(player, Ferret):
        player.replay(tuner.model, log)
    else:
        player.replay(log)
    with rundir.writing(out), quiet():
        if peft.Adapter().carries(tuner):
            tuner.save(out)
        else:
            plain: Any = tuner.merge()
            plain.save_pretrained(out)
            tokenizer.save_pretrained(out)
    return about | {"replayed": log.count}
