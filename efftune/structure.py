"""What a model is made of: its linear layers, its heads, its stack of blocks, and where each module stands."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.module import is_conv1d

READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
CLASSIFIERS = ("classifier", "score")  # what Hugging Face and PEFT call a classification head


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives logits over the vocabulary, where the model tells (as Hugging Face's do)."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def in_classifier(name: str) -> bool:
    """Whether the module `name` is a classification head or inside one."""
    return any(part in CLASSIFIERS for part in name.split("."))


def is_linear(module: nn.Module) -> bool:
    """Whether the layer can be swapped: nn.Linear itself, transformers' Conv1D and efftune.Linear, and no subclass,
    whose meaning is its own."""
    return type(module) in (nn.Linear, Linear) or is_conv1d(module)


def read_without_a_call(model: nn.Module) -> set[int]:
    """The ids of the children of torch's Transformer modules, which read `.weight` without calling the layer: an
    adapter there would silently do nothing."""
    return {id(child) for parent in model.modules() if isinstance(parent, READ_WEIGHTS) for child in parent.children()}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> layer, of those that can be swapped: linear ones that are called."""
    unseen = read_without_a_call(model)
    return {name: m for name, m in model.named_modules() if is_linear(m) and id(m) not in unseen}


def matches(name: str, target_modules: str | Iterable[str]) -> bool:
    """Whether the module path `name` is meant: a list names path endings, a string is a regular expression for the
    path or for an ending of it that begins at a dot ("q_proj|v_proj" and ".*\\.q_proj" both work)."""
    if isinstance(target_modules, str):
        try:
            return re.fullmatch(rf"(.*\.)?({target_modules})", name) is not None
        except re.error as error:
            raise EfftuneError(
                f"target_modules={target_modules!r} is no regular expression ({error}); give one, or a list of names."
            ) from None
    return any(name == target or name.endswith("." + target) for target in target_modules)


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


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """id(parameter) -> its names: several, where several modules share it (tied weights)."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            names.setdefault(id(parameter), []).append(name)
    return names


def overlaps(model: nn.Module) -> dict[int, list[str]]:
    """id(parameter) -> the names of other tensors of the model that lie, or may lie, in its memory: a tie that only the
    addresses tell of, as `a.weight.data = b.weight.data` makes it. Parameters without are left out."""
    spans: dict[int, tuple[int, int, str]] = {}
    found: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta:
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if tensor.numel():
                first = tensor.data_ptr()
                spans[id(tensor)] = first, first + (last + 1) * tensor.element_size(), name
                if any(n > 1 and not stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
                    found[id(tensor)] = [name]  # expanded: its entries lie in each other's memory
    active: list[tuple[int, int, str]] = []  # that may reach beyond the start of the next one
    for one, (first, end, name) in sorted(spans.items(), key=lambda item: item[1]):
        active = [other for other in active if other[1] > first]
        for other, _, before in active:
            found.setdefault(one, []).append(before)
            found.setdefault(other, []).append(name)
        active.append((one, end, name))
    return found


def places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id(module) -> the (parent, name) pairs under which it stands below `model`."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, name))
    return found
