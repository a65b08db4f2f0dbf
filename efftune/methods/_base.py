"""A method is a frozen dataclass: its fields are its settings, its hooks are what it does. One paper, one file.

A recipe is a list of methods; `efftune.apply` calls `prepare` in order and the training loop calls the other hooks in
the same order, but for `backward`, which is a chain in the order of `CHANGES`, `WATCHES` and `ESTIMATES`. Methods hold
no state: what a run needs to replay follows from the settings and the step, or is on the model and goes through
`state_dict`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import nn

from efftune.errors import EfftuneError
from efftune.hooks import watched
from efftune.linear import Exact, Linear, Trained
from efftune.linear.contracts import Keep, brief
from efftune.linear.module import is_conv1d, not_dense
from efftune.nn.attention import KEEP
from efftune.nn.eager_attention import ROWS

READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
ALL_LINEAR = "all-linear"
CHANGES, WATCHES, ESTIMATES = range(3)  # see Method.place
CLASSIFIERS = ("classifier", "score")  # what Hugging Face and PEFT call a classification head


@dataclasses.dataclass(frozen=True)
class Micro:
    """One micro-batch on its way through the methods of a recipe, each of which may hand on another one."""

    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], torch.Tensor]  # (model, batch) -> the loss, ()
    scale: float  # the gradient is that of scale · loss
    step: int
    last: bool  # of its step
    optimizer: torch.optim.Optimizer | None


Backward = Callable[[Micro], torch.Tensor]


def autograd(micro: Micro) -> torch.Tensor:
    """The end of the chain: accumulates the gradient of scale · loss and returns the detached loss."""
    loss = micro.loss(micro.model, micro.batch)
    (loss * micro.scale).backward()
    return loss.detach()


@dataclasses.dataclass(frozen=True)
class Method:
    name: ClassVar[str]
    trains: ClassVar[bool] = (
        False  # decides which parameters train; where no method of a recipe does, `full` is implied
    )
    place: ClassVar[int] = WATCHES  # in the chain of `backward`, from the outside
    learning_rate: ClassVar[float | None] = None  # of `efftune train` where none is given; None: the trainer's own

    def why_not(self, others: list[Method]) -> str | None:
        """Why this method cannot work with the others of a recipe, ending with a remedy, or None."""

    def prepare(self, model: nn.Module) -> None:
        """Changes the model in place: swaps layers, turns requires_grad on. The model arrives frozen.

        Called twice: on a skeleton of meta tensors, where all refusals belong, then on the model itself.
        """

    def param_groups(self, model: nn.Module) -> list[dict] | None:
        """Optimizer groups with ("name", parameter) pairs, or None for one group of all that trains."""

    def optimizer(self, groups: list[dict], **defaults) -> torch.optim.Optimizer | None:
        """The optimizer this method needs, or None for AdamW."""

    def block_keep(self) -> Keep | None:
        """What norms, activations and attention in the blocks keep for backward, or None for no say in it."""

    def exactly(self, model: nn.Module) -> AbstractContextManager:
        """Within it, the method approximates nothing: what `efftune verify` holds it against."""
        return nullcontext()

    def arrives(self, name: str, change: torch.Tensor, turn: int) -> torch.Tensor:
        """What becomes in round `turn` of a change of the parameter `name`, where the method approximates changes."""
        return change

    def remove(self, model: nn.Module) -> None:
        """Takes out what `prepare` installed besides layers (hooks, wrappers), before those become plain again."""

    def report(self, model: nn.Module) -> str | None:
        """A line for `Tuner.summary`: what cannot be read off the settings."""

    def before_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called before the first micro-batch of step 0, 1, 2, ..."""

    def backward(self, micro: Micro, inner: Backward) -> torch.Tensor:
        """Accumulates the gradient of scale · loss and returns the detached loss, around the methods inside: `inner`
        does so for the micro-batch that it is given. What changes the loss or the batch, or skips it, stands outside
        (`place = CHANGES`), then what looks at each micro-batch once (`WATCHES`), then what takes the place of
        autograd's gradient, or calls for it several times (`ESTIMATES`: one in a recipe)."""
        return inner(micro)

    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after optimizer.step()."""

    def state_dict(self, model: nn.Module) -> dict:
        """What the method has learnt and put on the model, for a checkpoint: numbers, strings, tensors, nested."""
        return {}

    def load_state_dict(self, model: nn.Module, state: dict) -> None:
        """Puts back what `state_dict` gave."""

    def overrides(self, hook: str) -> bool:
        return getattr(type(self), hook) is not getattr(Method, hook)

    def __str__(self) -> str:
        """As the recipe language writes it, with the settings that differ from their defaults."""
        return brief(self, self.name)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives logits over the vocabulary, where the model tells (as Hugging Face's do)."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def is_linear(module: nn.Module) -> bool:
    """Whether the layer can be swapped: nn.Linear itself, transformers' Conv1D and efftune.Linear, and no subclass,
    whose meaning is its own."""
    return type(module) in (nn.Linear, Linear) or is_conv1d(module)


def matches(name: str, target_modules: str | Iterable[str]) -> bool:
    """Whether the module path `name` is meant: a list names path endings, a string is a regular expression for the
    path or for an ending of it that begins at a dot ("q_proj|v_proj" and ".*\\.q_proj" both work)."""
    if isinstance(target_modules, str):
        return re.fullmatch(rf"(.*\.)?({target_modules})", name) is not None
    return any(name == target or name.endswith("." + target) for target in target_modules)


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the layers that can be swapped: linear ones, but not the children of torch's Transformer modules,
    which read `.weight` without calling the layer: an adapter there would silently do nothing.
    """
    unseen = {
        id(child) for parent in model.modules() if isinstance(parent, READ_WEIGHTS) for child in parent.children()
    }
    return [name for name, m in model.named_modules() if is_linear(m) and id(m) not in unseen]


def target_layers(method: Method, model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """The names of the linear layers that `target_modules` means. "all-linear": every one but those of the head, over
    the vocabulary or for classification.

    Raises: EfftuneError if it matches nothing, or matches only layers that are not linear.
    """
    if is_linear(model):
        raise EfftuneError(
            f"{method.name} swaps layers inside a model, and this is a layer; use efftune.Linear.from_linear on it."
        )
    linear = linear_layers(model)
    if not linear:
        raise EfftuneError(f"{type(model).__name__} has no linear layer for {method.name} to act on.")
    if target_modules == ALL_LINEAR:
        head = output_head(model)
        chosen = [n for n in linear if model.get_submodule(n) is not head and not in_classifier(n)]
    else:
        chosen = [name for name in linear if matches(name, target_modules)]
    if not chosen:
        endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        raise EfftuneError(
            f"target_modules={target_modules!r} matches no linear layer of {type(model).__name__}; "
            f"its linear layers end in: {endings}."
        )
    return chosen


def in_classifier(name: str) -> bool:
    """Whether the module `name` is a classification head or inside one."""
    return any(part in CLASSIFIERS for part in name.split("."))


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """id(parameter) -> its names, for parameters that several different modules share (tied weights)."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            names.setdefault(id(parameter), []).append(name)
    return {key: value for key, value in names.items() if len(value) > 1}


def swap(model: nn.Module, names: Iterable[str], **axes) -> None:
    """Replaces the layers `names` by efftune.Linears with these axes, in place, wherever each of them stands below
    `model`: a layer that is used under two names stays one layer.

    Raises: EfftuneError, naming the layer, if the axes cannot be combined or the layer already trains another way.
    """
    where = places(model)
    delta = axes.get("delta")
    for name in names:
        layer = model.get_submodule(
            name
        )  # held no longer than this turn: the old weight may be the memory that is short
        if delta is not None and not watched(layer) and trained_by(layer) not in (None, delta):
            raise EfftuneError(
                f"{name} is already trained as {trained_by(layer)}, so {delta} cannot be added; "
                "give the two methods different target_modules."
            )
        try:
            new = Linear.from_linear(layer, **axes)
        except ValueError as error:
            raise EfftuneError(f"{name}: {error}") from None
        for parent, child in where[id(layer)]:
            parent._modules[child] = new  # not by setattr, which a module may have made its own


def keep_in_layers(method: Method, model: nn.Module, target_modules: str | Iterable[str], keep: Keep) -> list[str]:
    """Lets the trained ones among the layers that `target_modules` means keep their input with `keep`; their names.

    Raises: EfftuneError if none of them trains: a frozen layer keeps nothing, so there is nothing to save.
    """
    chosen = target_layers(method, model, target_modules)
    trained = [name for name in chosen if _needs_input(model.get_submodule(name))]
    if not trained:
        raise EfftuneError(
            f"{method} acts on what trained layers keep, and none of the {len(chosen)} layers that it means keeps its "
            "input; put it after the method that trains them."
        )
    sampled = [
        n for n in trained if (old := getattr(model.get_submodule(n), "keep", keep)) != keep and not old.restores
    ]
    if sampled and not keep.restores:
        raise EfftuneError(
            f"{sampled[0]} samples its rows already ({model.get_submodule(sampled[0]).keep}); leave out one of the "
            "methods that sample, or give them different target_modules."
        )
    if keep.restores:  # a layer that keeps some of its rows only goes on to do so, in whatever order a recipe says it
        trained = [n for n in trained if getattr(model.get_submodule(n), "keep", Exact()).restores]
    swap(model, trained, keep=keep)
    return trained


@contextmanager
def exact_keeps(model: nn.Module) -> Iterator[None]:
    """Within it, everything in `model` that backward keeps is kept exactly."""
    drawing = drawing_keeps(model)
    for module, name, _ in drawing:
        setattr(module, name, Exact())
    try:
        yield
    finally:
        for module, name, keep in drawing:
            setattr(module, name, keep)


def drawing_keeps(model: nn.Module) -> list[tuple[nn.Module, str, Keep]]:
    """Module, attribute and keep, of all in `model` that backward keeps by drawing."""
    keeps = ((m, name, getattr(m, name, None)) for m in model.modules() for name in (KEEP, ROWS))
    return [(module, name, keep) for module, name, keep in keeps if isinstance(keep, Keep) and keep.random]


def _needs_input(layer: nn.Module) -> bool:
    if isinstance(layer, Linear):
        return layer.delta.needs_keep() and trained_by(layer) is not None
    return cast(nn.Linear, layer).weight.requires_grad


def places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id(module) -> the (parent, name) pairs under which it stands below `model`."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, name))
    return found


def train_wholly(model: nn.Module, root: str) -> None:
    """Every floating-point parameter of the module `root` trains.

    Raises: EfftuneError where a layer's storage cannot be trained.
    """
    inside = {name: m for name, m in model.get_submodule(root).named_modules(prefix=root) if isinstance(m, Linear)}
    for name, layer in inside.items():
        if not layer.base.trains:
            raise EfftuneError(f"{name}: {not_dense(layer.base)}.")
    swap(model, inside, delta=Trained())
    for parameter in model.get_submodule(root).parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


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
