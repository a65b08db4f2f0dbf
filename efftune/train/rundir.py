"""The run directory: config.json, metrics.jsonl, loss.png, memory.png, report.html, checkpoints/, adapter/."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from efftune.errors import EfftuneError
from efftune.files import ADAPTER, CHECKPOINTS

NUMBERED = "runs/{}-{:03d}"


class RunDir:
    def __init__(self, path: Path, resumed: bool, tensorboard: bool = False):
        self.path, self.resumed = path, resumed
        self.metrics, self.checkpoints, self.adapter = path / "metrics.jsonl", path / CHECKPOINTS, path / ADAPTER
        self.events: Any = None
        self.open_events: Callable[[], Any] | None = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise EfftuneError(
                    "--tensorboard needs the package tensorboard; install it or leave the option out."
                ) from None
            self.open_events = lambda: SummaryWriter(str(path / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line."""
        with writing(self.path), self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.open_events:
            self.events = self.events or self.open_events()
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.events.add_scalar(name, value, record["step"])

    def records(self) -> list[dict[str, Any]]:
        """All complete lines; a kill may have left half a line at the end."""
        if not self.metrics.exists():
            return []
        records = []
        for text in self.metrics.read_text().splitlines():
            try:
                records.append(json.loads(text))
            except ValueError:
                break
        return records

    def find(self, when: str, step: int | None = None) -> dict[str, Any] | None:
        """The record of the evaluation "before" or "after" training, or of "memory", that was logged at `step`, or at
        any."""
        found = (r for r in self.records() if r.get("when") == when and step in (None, r["step"]))
        return next(found, None)

    def cut_metrics(self, step: int) -> None:
        """Drops what came after `step`; that will be written again."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        with writing(self.path):
            write_atomically(self.metrics, "".join(kept))

    def sync(self) -> None:
        if self.metrics.exists():
            with self.metrics.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EfftuneError(f"{path} cannot be written ({reason}): free some space and run it again.") from error


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def choose(out: str | None, resume: bool, kind: str = "train") -> Path:
    """The run directory that is meant, or the folder that a command of another `kind` writes.

    Raises: EfftuneError for a folder with something in it and no --resume, and for --resume without a run.
    """
    if out is None:
        number = 1
        while Path(NUMBERED.format(kind, number)).exists():
            number += 1
        if not resume:
            return Path(NUMBERED.format(kind, number))
        if number == 1:
            raise EfftuneError("--resume finds no run in runs/; name one with --out.")
        return Path(NUMBERED.format(kind, number - 1))
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise EfftuneError(f"--out {out} is a file; give a folder.")
    if resume and not path.is_dir():
        raise EfftuneError(f"--resume finds no run at {out}; check --out, or start the run without --resume.")
    if not resume and path.is_dir() and any(path.iterdir()):
        remedy = (
            "add --resume to continue the run in it, or give another --out"
            if kind == "train"
            else "give another folder"
        )
        raise EfftuneError(f"{out} is not empty; {remedy}.")
    return path


def create(path: Path, numbered: bool, kind: str = "train") -> Path:
    """Makes the directory of a new run; if it is a numbered one that another run has just taken, the next free one."""
    with writing(path):
        while True:
            try:
                path.mkdir(parents=True, exist_ok=not numbered)
                return path
            except FileExistsError:
                if not numbered:
                    raise
                path = choose(None, resume=False, kind=kind)
