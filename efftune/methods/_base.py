"""A method is a frozen dataclass: its fields are its settings, its hooks are what it does. One paper, one file.

A recipe is a list of methods; `efftune.apply` calls `prepare` in order and the training loop calls the other hooks in
the same order. Methods hold no state: what a run needs to replay follows from the settings and the step.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch
from torch import nn

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.contracts import brief

LINEAR = (nn.Linear, Linear)
ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Method:
    name: ClassVar[str]
    trains: ClassVar[bool] = (
        False  # decides which parameters train; where no method of a recipe does, `full` is implied
    )

    def prepare(self, model: nn.Module) -> None:
        """Changes the model in place: swaps layers, turns requires_grad on. The model arrives frozen.

        Called twice: on a skeleton of meta tensors, where all refusals belong, then on the model itself.
        """

    def param_groups(self, model: nn.Module) -> list[dict] | None:
        """Optimizer groups with ("name", parameter) pairs, or None for one group of all that trains."""

    def optimizer(self, groups: list[dict], **defaults) -> torch.optim.Optimizer | None:
        """The optimizer this method needs, or None for AdamW."""

    def before_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called before the first micro-batch of step 0, 1, 2, ..."""

    def backward(self, model: nn.Module, batch, loss_fn: Callable, scale: float, step: int, optimizer) -> torch.Tensor:
        """Replaces loss.backward(): accumulates the gradient of scale · loss and returns the detached loss."""
        loss = loss_fn(model, batch)
        (loss * scale).backward()
        return loss.detach()

    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after optimizer.step()."""

    def overrides(self, hook: str) -> bool:
        return getattr(type(self), hook) is not getattr(Method, hook)

    def __str__(self) -> str:
        """As the recipe language writes it, with the settings that differ from their defaults."""
        return brief(self, self.name)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives logits over the vocabulary, where the model tells (as Hugging Face's do)."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def matches(name: str, target_modules: str | Iterable[str]) -> bool:
    """Whether the module path `name` is meant: a list names path endings, a string is a regular expression for the
    path or for an ending of it that begins at a dot ("q_proj|v_proj" and ".*\\.q_proj" both work)."""
    if isinstance(target_modules, str):
        return re.fullmatch(rf"(.*\.)?({target_modules})", name) is not None
    return any(name == target or name.endswith("." + target) for target in target_modules)


def target_layers(method: Method, model: nn.Module, target_modules: str | Iterable[str]) -> Mapping[str, nn.Module]:
    """The linear layers that `target_modules` means. "all-linear": every one but the output head.

    Raises: EfftuneError if it matches nothing, or matches only layers that are not linear.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, LINEAR)}
    if not linear:
        raise EfftuneError(f"{type(model).__name__} has no linear layer for {method.name} to act on.")
    if target_modules == ALL_LINEAR:
        head = output_head(model)
        chosen = {name: m for name, m in linear.items() if m is not head}
    else:
        chosen = {name: m for name, m in linear.items() if matches(name, target_modules)}
    if not chosen:
        endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        raise EfftuneError(
            f"target_modules={target_modules!r} matches no linear layer of {type(model).__name__}; "
            f"its linear layers end in: {endings}."
        )
    return chosen


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """id(parameter) -> its names, for parameters that several different modules share (tied weights)."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            names.setdefault(id(parameter), []).append(name)
    return {key: value for key, value in names.items() if len(value) > 1}


def swap(model: nn.Module, name: str, **axes) -> Linear:
    """Replaces the layer `name` by an efftune.Linear with these axes, in place.

    Raises: EfftuneError, naming the layer, if the axes cannot be combined or the layer already trains another way.
    """
    layer = model.get_submodule(name)
    delta = axes.get("delta")
    if delta is not None and trained_by(layer) not in (None, delta):
        raise EfftuneError(
            f"{name} is already trained as {trained_by(layer)}, so {delta} cannot be added; "
            "give the two methods different target_modules."
        )
    try:
        new = Linear.from_linear(layer, **axes)
    except EfftuneError as error:
        raise EfftuneError(f"{name}: {error}") from None
    replace_module(model, layer, new)
    return new


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` stands below `model`: a layer that is used under two names stays one layer."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def trained_by(layer: nn.Module):
    """The delta that trains this layer, "full" for an nn.Linear that trains, or None."""
    if isinstance(layer, Linear):
        return layer.delta if layer.delta.trains else None
    return "full" if layer.weight.requires_grad else None


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of alike layers of a transformer: the ModuleList with the most parameters among those of one class.

    Raises: EfftuneError if there is none.
    """
    stacks = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) and len({type(layer) for layer in m}) == 1
    ]
    if not stacks:
        raise EfftuneError(f"{type(model).__name__} has no nn.ModuleList of alike layers to choose from.")
    return max(stacks, key=lambda s: sum(p.numel() for p in s[1].parameters()))
