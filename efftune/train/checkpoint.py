"""Checkpoints on disk: safetensors and JSON, complete or absent, checked before anything is overwritten.

    checkpoints/step-00000100/trained.safetensors     what the recipe trains
                              optimizer.safetensors   every other tensor: optimizer, generators, method state
                              state.json              the rest, and the sha256 of all three

A checkpoint is written under a temporary name, each file and both folders are synced, and then it is renamed: a kill
or a full disk at any moment leaves the previous one as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from efftune.errors import EfftuneError
from efftune.files import refuse_pickle

TRAINED, REST, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
NAMES = {  # of what must match, in an error; the rest are options
    "recipe": "the recipe",
    "base": "the base model",
    "data": "the training data",
    "eval_data": "the held-out data",
    "processes": "the number of processes",
}


class Damaged(EfftuneError):
    """A checkpoint that is truncated, altered or incomplete."""


def save(
    root: Path, step: int, trained: dict[str, torch.Tensor], rest: Any, identity: dict[str, Any], keep: int
) -> Path:
    """Writes `root/step-<step>`, then deletes earlier ones, so that `keep` are left. Later ones stay: they are damaged.

    Args:
        rest: nested dicts, lists, tuples, numbers, strings and tensors, such as an optimizer's state_dict.
        identity: recipe, base-model fingerprint and settings that a later `load` must present.
    Raises: EfftuneError in one sentence when the disk is full or not writable; earlier checkpoints stay.
    """
    final = root / f"step-{step:08d}"
    temporary = root / f".writing-{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".*-step-*"):  # of a killed run
            shutil.rmtree(leftover)
        temporary.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        tree = to_tree(rest, tensors)
        save_file(_storable(trained), temporary / TRAINED, metadata={"format": "pt"})
        save_file(_storable(tensors), temporary / REST, metadata={"format": "pt"})
        files = {name: sha256(temporary / name) for name in (TRAINED, REST)}
        state = {"step": step, "identity": identity, "files": files, "tree": tree}
        (temporary / STATE).write_text(json.dumps(state | {"sha256": _digest(state)}) + "\n")
        for name in (TRAINED, REST, STATE):
            _sync(temporary / name)
        _sync(temporary)
        if final.exists():  # a resumed run comes by a damaged one again
            _remove(final)
        temporary.rename(final)
        _sync(root)
        for old in [*_before(final), final][:-keep]:
            _remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # an OSError prints the temporary path; what matters is the reason
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        previous = _before(final)
        kept = f"the previous one, {previous[-1]}, is intact" if previous else "there is no earlier one"
        raise EfftuneError(
            f"The checkpoint of step {step} could not be written ({reason}): {kept}; "
            "free some space and run again with --resume."
        ) from error
    return final


def steps_in(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def _before(final: Path) -> list[Path]:
    return [path for path in steps_in(final.parent) if path.name < final.name]


def newest_intact(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what was written, and a sentence about each newer one that is not."""
    damaged = []
    for path in reversed(steps_in(root)):
        try:
            verify(path)
            return path, damaged
        except Damaged as error:
            damaged.append(str(error))
    return None, damaged


def verify(path: Path) -> dict[str, Any]:
    """state.json, after every file proved to be what was written. Raises: Damaged, or EfftuneError for a pickle."""
    for name in (TRAINED, REST):
        refuse_pickle(path / name)
    try:
        state = json.loads((path / STATE).read_text())
        if state.pop("sha256") != _digest(state):
            raise Damaged(f"{path} is damaged ({STATE} was altered); delete it to go on from an earlier one.")
        for name, digest in state["files"].items():
            if sha256(path / name) != digest:
                raise Damaged(
                    f"{path} is damaged ({name} is truncated or altered); delete it to go on from an earlier one."
                )
        if not isinstance(state["identity"], dict) or {"step", "tree"} - set(state):
            raise KeyError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, EfftuneError):
            raise
        what = error.strerror if isinstance(error, OSError) else "not what was written"
        raise Damaged(f"{path} is damaged ({STATE}: {what}); delete it to go on from an earlier one.") from error
    return state


def load(path: Path, identity: dict[str, Any]) -> tuple[int, dict[str, torch.Tensor], Any]:
    """Returns (step, trained tensors, rest). Nothing is given out before the files and all of `identity` are proved
    right."""
    state = verify(path)
    for key, now in identity.items():
        before = state["identity"].get(key)
        if before != now:
            name = NAMES.get(key, "--" + key.replace("_", "-"))
            was = "" if key in ("base", "data", "eval_data") else f" ({before!r}, now {now!r})"  # those are digests
            raise EfftuneError(
                f"{path} does not fit: {name} is another one{was}; resume with what the run began with, "
                "or start a new run with another --out."
            )
    try:
        rest = from_tree(state["tree"], load_file(path / REST))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{path} is damaged ({STATE} was altered); delete it to go on from an earlier one.") from error
    return state["step"], load_file(path / TRAINED), rest


def to_tree(value: Any, tensors: dict[str, torch.Tensor], at: str = "") -> Any:
    """`value` as JSON, its tensors put aside and numbered. Keys that are no strings and tuples survive."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))  # not `at`: the keys 1 and "1" have the same path
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, to_tree(v, tensors, f"{at}/{key}")] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [to_tree(v, tensors, f"{at}/{i}") for i, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise EfftuneError(f"'{at}' in the training state is a {type(value).__name__}, which a checkpoint cannot hold.")


def from_tree(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [from_tree(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, body),) = tree.items()
    if kind == "tensor":
        return tensors[body]
    if kind == "tuple":
        return tuple(from_tree(v, tensors) for v in body)
    return {key: from_tree(v, tensors) for key, v in body}


def _storable(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # safetensors refuses views and shared storage
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Under another name first: a kill in the middle must not leave half a checkpoint."""
    doomed = path.with_name(f".deleting-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)
