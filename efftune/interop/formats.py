"""What a tuned model is saved as: a list of formats, each of which says what it can carry, and nothing may be left."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.files import copy_tensors, read_tensors
from efftune.interop.peft import Adapter
from efftune.interop.shira import Shira
from efftune.interop.sparse import Sparse
from efftune.linear.module import room_for

TRAINED = "trained.safetensors"


class Tuned(Protocol):
    """What a format is given: an `efftune.Tuner`."""

    @property
    def model(self) -> nn.Module: ...

    def named_trained(self) -> dict[str, nn.Parameter]: ...

    def named_saved(self) -> dict[str, Tensor]: ...


class Format(Protocol):
    """One way to write tensors of `Tuned.named_saved` into a folder."""

    name: str  # of `Tuner.save(format=...)`
    file: str  # whose presence in a folder says that something was saved so
    reader: str | None  # another library that reads the file, and nothing beside it

    def carries(self, tuned: Tuned) -> set[str]:
        """The names of what it can write of this model."""
        ...

    def write(self, tuned: Tuned, names: set[str], path: Path) -> None:
        """Writes these, of those that it carries, into the folder `path`."""
        ...

    def read(self, tuned: Tuned, path: Path) -> dict[str, Tensor]:
        """The tensors in the folder `path`, by the names of `named_saved`; what has none there keeps its own."""
        ...


class Safetensors:
    """Everything under its own name, in one safetensors file."""

    name, file = "safetensors", TRAINED
    reader: str | None = None

    def carries(self, tuned):
        saved = tuned.named_saved().items()
        return {name for name, t in saved if t.layout is torch.strided and not t.is_meta}

    def write(self, tuned, names, path):
        from safetensors.torch import save_file

        tensors = {n: t.detach().contiguous().clone() for n, t in tuned.named_saved().items() if n in names}
        save_file(tensors, path / TRAINED, metadata={"format": "pt"})

    def read(self, tuned, path):
        return read_tensors(path / TRAINED)


FORMATS: list[Format] = [Adapter(), Sparse(), Safetensors()]  # `save` gives each what those before it did not carry
ASKED_FOR: list[Format] = [Shira()]  # only where somebody asks for it
OF_PEFT = [Adapter.name, Shira.name]  # what a folder of PEFT's may be


def save(tuned: Tuned, path: Path, only: str | None = None) -> list[str]:
    """Writes `tuned.named_saved()` into the folder `path`, or all of it in the format `only`. Returns the names of the
    formats that it wrote.

    Raises: EfftuneError, before anything is written, where no format carries something.
    """
    formats = FORMATS if only is None else [_named(only)]
    left, shares = set(tuned.named_saved()), list[tuple[Format, set[str]]]()
    for format in formats:
        if share := format.carries(tuned) & left:
            shares.append((format, share))
            left -= share
    if left and only is None:
        raise EfftuneError(f"No format can carry {_list(left)}; bring it into memory as a dense tensor first.")
    if left:
        able = [f" or with format={f.name!r}" for f in ASKED_FOR if f.carries(tuned) >= set(tuned.named_saved())]
        raise EfftuneError(
            f"The format {only!r} would lose {_list(left)}; save without format=, in all that it takes{''.join(able)}."
        )
    path.mkdir(parents=True, exist_ok=True)
    for format, share in shares:
        format.write(tuned, share, path)
        beside = tuned.named_trained().keys() - share
        if format.reader is not None and beside:
            warnings.warn(
                f"{format.reader} has no place for {_list(beside)}, and gives other outputs from {path / format.file}: "
                "efftune.load reads what lies beside it as well.",
                stacklevel=3,
            )
    return [format.name for format, _ in shares]


def load(tuned: Tuned, path: Path, written: list[str], optional: Iterable[str] = ()) -> None:
    """Copies into the model what the formats `written` hold in the folder `path`.

    Args:
        optional: names of `tuned.named_saved()` that need not be there.
    Raises: EfftuneError, before anything is copied, if a tensor is missing, left over or does not fit.
    """
    for name in written if isinstance(written, list) else (written,):  # from a file
        _named(name)
    targets, tensors = tuned.named_saved(), dict[str, Tensor]()
    for format in (*FORMATS, *ASKED_FOR):
        if format.name in written and (targets.keys() - tensors.keys()) & format.carries(tuned):
            tensors |= format.read(tuned, path)
    for name in set(optional) - tensors.keys():
        del targets[name]
    with room_for(tuned.model, tensors):
        copy_tensors(tensors, targets, path, type(tuned.model).__name__)


def present(path: Path) -> list[str]:
    """The formats in a folder that does not say how it was written: of an earlier version. The last one is always
    taken to be there, so that it is missed where it is needed."""
    return [format.name for format in FORMATS if (path / format.file).exists() or format is FORMATS[-1]]


def _named(name: str) -> Format:
    formats = (*FORMATS, *ASKED_FOR)
    for format in formats:
        if format.name == name:
            return format
    raise EfftuneError(f"There is no format {name!r}; the formats are: {', '.join(f.name for f in formats)}.")


def _list(names: set[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more
