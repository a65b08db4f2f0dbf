"""Reading what others wrote: safetensors and JSON only, and one sentence for what is not that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efftune.errors import EfftuneError

ADAPTER, CHECKPOINTS = "adapter", "checkpoints"  # folders of a run
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def refuse_pickle(path: Path) -> None:
    """Raises EfftuneError when `path` is a pickle, or is not there and a pickle lies in its place."""
    _refuse_no_file(path)
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
        # safetensors begins with the header's length in 8 bytes, which may look like anything, and then "{"
        pickled = start[8:] != b"{" and (start[:1] == b"\x80" or start[:4] == b"PK\x03\x04")
        found = path if pickled or path.suffix in PICKLES else None
    else:
        found = next((other for other in sorted(path.parent.glob("*")) if other.suffix in PICKLES), None)
    if found:
        raise EfftuneError(
            f"{found} is a pickle, and reading a pickle can run any code that is in it: "
            "only safetensors are read; convert it where you trust it (safetensors.torch.save_file)."
        )


def _refuse_no_file(path: Path) -> None:
    if path.exists() and not path.is_file():  # to read a pipe is to wait for who writes to it
        raise EfftuneError(f"{path} is no regular file; save or fetch it again.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises: EfftuneError if it is missing, damaged or a pickle."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_pickle(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise EfftuneError(f"There is no {path}; give the folder that an adapter or a run was saved to.") from None
    except SafetensorError as error:
        raise EfftuneError(f"{path} is damaged ({error}); save or fetch it again.") from None


def copy_tensors(tensors: dict[str, Tensor], targets: dict[str, Tensor], path: Path, model: str) -> None:
    """Copies what was read from `path` into `targets`. Raises: EfftuneError, before anything is copied, if a tensor is
    missing, left over, of another shape or sort of number, or has NaN or Inf where its target has none."""
    wrong = sorted(targets.keys() ^ tensors.keys())
    wrong += sorted(name for name in targets.keys() & tensors.keys() if not _fits(tensors[name], targets[name]))
    if wrong:
        raise EfftuneError(f"{path} does not fit {model} (first at {wrong[0]}): nothing was loaded.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)


def _fits(tensor: Tensor, target: Tensor) -> bool:
    if tensor.shape != target.shape:
        return False
    if not (tensor.is_floating_point() and target.is_floating_point()):
        return tensor.dtype == target.dtype
    return bool(tensor.isfinite().all()) or not bool(target.isfinite().all())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: EfftuneError if it is missing or not JSON."""
    _refuse_no_file(path)
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise EfftuneError(f"There is no {path}; give the folder that an adapter or a run was saved to.") from None
    except ValueError as error:
        raise EfftuneError(f"{path} is not JSON ({error}); save or fetch it again.") from None
    if not isinstance(value, dict):
        raise EfftuneError(f"{path} holds no JSON object; save or fetch it again.")
    return value


def required(config: dict[str, Any], key: str, path: Path) -> Any:
    """config[key]. Raises: EfftuneError naming the file and the key that it lacks."""
    if key not in config:
        raise EfftuneError(f"{path} has no {key!r}: it was altered or cut; save or fetch it again.")
    return config[key]
