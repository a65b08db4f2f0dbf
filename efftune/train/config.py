"""The settings of a run. The command line is made from this dataclass, field by field."""

from __future__ import annotations

import dataclasses
import json
import types
from argparse import ArgumentParser, BooleanOptionalAction
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from efftune.errors import EfftuneError
from efftune.files import read_json
from efftune.train.rundir import write_atomically


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    model: str | None = _setting(
        None, "model folder or Hugging Face name (default: a small Llama, trained on the spot)"
    )
    data: str | None = _setting(None, "training file: .jsonl, .json, .txt, .md, .csv, .tsv or .parquet")
    recipe: str = _setting("lora(r=16)", "what trains and how, for example 'int8 + lora(r=8)'")
    blocks: bool = _setting(
        True, "norms, activations and attention whose outputs backward makes again, rotary embedding in one pass"
    )
    out: str | None = _setting(None, "run directory (default: the next free runs/train-NNN)")
    resume: bool = _setting(
        False, "continue the run in --out from its newest intact checkpoint; --steps or --epochs may be new"
    )

    task: Literal["auto", "causal-lm", "classification"] = _setting("auto", "auto: from the columns of the data")
    objective: str = _setting(
        "loss",
        "loss, or with a zeroth-order recipe a metric to maximise: accuracy, f1, package.module:function or "
        "file.py:function",
    )
    eval_data: str | None = _setting(None, "held-out file (default: a part of the training file)")
    eval_fraction: float = _setting(0.05, "part of the training file that is held out, without --eval-data")
    seq_len: int = _setting(512, "tokens in a row")
    too_long: Literal["error", "truncate", "drop"] = _setting(
        "error", "examples above --seq-len (text is cut in windows)"
    )
    packing: bool = _setting(True, "several examples in one row, none sees another (causal-lm only)")

    steps: int | None = _setting(None, "optimizer steps (default: what --epochs makes)")
    epochs: float = _setting(1.0, "passes over the data, when --steps is not given")
    batch_size: int = _setting(8, "rows in one forward pass of each process")
    grad_accum: int = _setting(1, "forward passes in one optimizer step")
    lr: float = _setting(2e-4, "peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = _setting("cosine", "learning rate after the warm-up")
    warmup: float = _setting(0.03, "warm-up: steps, or below 1 a fraction of all steps")
    weight_decay: float = _setting(0.0, "decoupled weight decay")
    clip: float = _setting(1.0, "largest gradient norm; 0 switches clipping off")
    dtype: Literal["float32", "bf16", "mixed"] = _setting(
        "float32",
        "bf16: weights and arithmetic in bfloat16; mixed: float32 weights, arithmetic under bfloat16 autocast",
    )
    seed: int = _setting(0, "of everything that is drawn")
    device: str = _setting("auto", "auto: the GPU if there is one")
    threads: int | None = _setting(None, "of a CPU (default: one or all, whichever runs a batch in less time)")

    eval_every: int = _setting(0, "steps between evaluations; 0: before and after only")
    eval_rows: int = _setting(512, "held-out rows that an evaluation reads; 0: all")
    save_every: int = _setting(100, "steps between checkpoints; there is always one at the end; 0: that one only")
    keep_last: int = _setting(2, "checkpoints that are kept")
    sample_prompt: str | None = _setting(
        None, "text to continue before and after (default: the start of a held-out row)"
    )
    sample_tokens: int = _setting(60, "length of that sample; 0: none")
    tensorboard: bool = _setting(False, "also write TensorBoard events into the run directory")

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            value = getattr(self, name)
            choices = get_args(kind) if get_origin(kind) is Literal else None
            if choices and value not in choices:
                raise EfftuneError(f"{option(name)} is {value!r}; it can be {' | '.join(choices)}.")
            absent = value is None and getattr(TrainConfig, name) is None
            if not choices and not absent and not isinstance(value, (int, float) if kind is float else kind):
                raise EfftuneError(f"{option(name)} is {value!r}; it must be of type {kind.__name__}.")
        for name in ("seq_len", "batch_size", "grad_accum", "keep_last", "lr", "epochs", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise EfftuneError(f"{option(name)} is {getattr(self, name)}; it must be above 0.")
        for name in (
            "steps",
            "warmup",
            "weight_decay",
            "clip",
            "eval_every",
            "eval_rows",
            "save_every",
            "sample_tokens",
        ):
            if (getattr(self, name) or 0) < 0:
                raise EfftuneError(f"{option(name)} is {getattr(self, name)}; it cannot be below 0.")
        if not 0 <= self.eval_fraction < 1:
            raise EfftuneError(f"--eval-fraction is {self.eval_fraction}; it must be at least 0 and below 1.")

    def save(self, path: Path, labels: list[str] | None) -> None:
        """Writes the settings, their paths absolute, and the names of the classes (None: a causal language model)."""
        settings = dataclasses.asdict(self)
        for name in ("model", "data", "eval_data", "out"):
            if settings[name] and (name != "model" or Path(settings[name]).is_dir()):
                settings[name] = str(Path(settings[name]).absolute())
        write_atomically(path, json.dumps(settings | {"labels": labels}, indent=2) + "\n")

    @staticmethod
    def load_settings(path: Path) -> tuple[dict[str, Any], list[str] | None]:
        """The settings of an earlier run and the names of its classes, as `save` wrote them."""
        settings = read_json(path)
        known = _kinds()
        missing = [name for name in (*known, "labels") if name not in settings]
        if missing:
            raise EfftuneError(f"{path} lacks '{missing[0]}'; restore it or start again with another --out.")
        return {name: settings[name] for name in known}, settings["labels"]


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kinds() -> dict[str, Any]:
    """Field name -> its type, without `| None`."""
    kinds = {}
    for name, kind in get_type_hints(TrainConfig).items():
        if get_origin(kind) in (Union, types.UnionType):
            (kind,) = [part for part in get_args(kind) if part is not type(None)]
        kinds[name] = kind
    return kinds


def add_options(parser: ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """One option for each field but those in `without`. What is not given stays absent, so that a job or a resumed run
    can fill it in."""
    kinds = _kinds()
    for field in dataclasses.fields(TrainConfig):
        if field.name in without:
            continue
        kind, text = kinds[field.name], field.metadata["help"].replace("%", "%%")
        if field.default is not None and field.default is not False:
            text += f" [{field.default}]"
        how: dict[str, Any] = {"help": text, "default": None, "dest": field.name}
        if kind is bool:
            how["action"] = BooleanOptionalAction if field.default else "store_true"
        elif get_origin(kind) is Literal:
            how["choices"] = get_args(kind)
        else:
            how |= {"type": kind, "metavar": "N" if kind in (int, float) else field.name.upper()}
        parser.add_argument(option(field.name), **how)


def given_options(namespace: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in vars(namespace).items() if name in names and value is not None}
