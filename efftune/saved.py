"""`efftune.load`: what a tuner or PEFT saved, onto a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from efftune.errors import EfftuneError
from efftune.files import ADAPTER, CHECKPOINTS, read_json, required
from efftune.interop import formats, peft
from efftune.methods._base import Method
from efftune.recipe import format_recipe, parse, terms
from efftune.tuner import CONFIG, Tuner, applied, apply, planned
from efftune.wrappers import unwrapped


def load(model: nn.Module, path: str | Path, recipe: str | Method | Iterable[Method] | None = None) -> Tuner:
    """Applies to `model` what `Tuner.save` or PEFT wrote to the folder `path`: its recipe and its tensors. Of the
    folder of a finished run it takes the adapter.

    Args:
        recipe: the one that was saved, as `apply` takes it: needed where a method of it is not found by its name, or
            has a setting that a recipe cannot write.
    Raises: EfftuneError if files are missing, damaged, pickles, or do not fit the model or the recipe.
    """
    path = _adapter_folder(Path(path))
    if not (path / CONFIG).exists():  # PEFT wrote it
        if recipe is not None:
            raise EfftuneError(f"{path} is an adapter of PEFT's, whose files say the recipe; load it without recipe=.")
        tuner = apply(model, peft.methods(path, unwrapped(model)))
        trained = tuner.named_trained()  # PEFT leaves out what may be as it was
        optional = [name for name in tuner.named_saved() if name not in trained or name.endswith("bias")]
        formats.load(tuner, path, formats.OF_PEFT, optional)
        return tuner
    config = read_json(path / CONFIG)
    tuner = applied(model, _saved_methods(config, path / CONFIG, model, recipe), begins=False)
    formats.load(tuner, path, config.get("formats") or formats.present(path))
    return tuner


def _adapter_folder(path: Path) -> Path:
    """`path`, or the folder in it that is meant."""

    def saved(path: Path) -> bool:
        return (path / CONFIG).exists() or (path / peft.CONFIG).exists()

    if saved(path):
        return path
    if saved(path / ADAPTER):
        return path / ADAPTER
    if (path / CHECKPOINTS).is_dir():
        raise EfftuneError(
            f"{path} is a run that has not come to its end, so that there is no {path / ADAPTER}; continue it "
            f"(efftune train --out {path} --resume), or write what it has by efftune export {path} --out DIR."
        )
    if held := [str(folder) for folder in sorted(path.glob("*")) if saved(folder)]:
        raise EfftuneError(f"{path} itself holds nothing that was saved; give a folder in it: {', '.join(held[:5])}.")
    return path


def _saved_methods(
    config: dict[str, Any], file: Path, model: nn.Module, recipe: str | Method | Iterable[Method] | None
) -> list[Method]:
    """The methods of a saved recipe, or those given in their place, which have to be the same."""
    text, classes = required(config, "recipe", file), config.get("unnamed") or {}
    if not isinstance(text, str) or not isinstance(classes, dict):
        raise EfftuneError(f"{file} says recipe={text!r}, unnamed={classes!r}: it was altered; save or fetch it again.")
    if recipe is None:
        remedy = (
            "install or register the method (an entry point of the group efftune.methods), or give the methods: "
            f"efftune.load(model, {str(file.parent)!r}, recipe=[...])."
        )
        try:
            methods = parse(text)
        except EfftuneError as error:
            raise EfftuneError(
                f"{file} was saved with the recipe '{text}': {str(error).rstrip('.')}; {remedy}"
            ) from None
    else:
        remedy = "give the recipe that it was saved with."
        methods, _ = planned(model, recipe, begins=False)  # with what is implied
        given = format_recipe(methods)
        if terms(given) != terms(text):
            raise EfftuneError(f"{file} was saved with the recipe '{text}', and recipe= is '{given}'; {remedy}")
    for method in methods:
        if (kind := classes.get(method.name)) not in (None, type(method).__name__):
            raise EfftuneError(
                f"{file} was saved with a {kind} as {method.name!r}, which is a {type(method).__name__} here; {remedy}"
            )
    return methods
