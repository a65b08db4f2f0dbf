"""Which linear layers of a module read one tensor: found by running an outline of the module, not told by names.

A hook on the module runs before its first forward pass. It calls a copy of the module with copies of what the module
is about to be called with, made of fake tensors, with which nothing is computed. In the place of the linear layers
stand modules that write down what they are given. What cannot be copied, or looks at values, has no groups. Then, in
each forward pass, the hook puts the layers into a `Group`, in which the first that is called computes what all of them
give.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from efftune.hooks import on_parameters
from efftune.interop.transformers.blocks import OURS
from efftune.linear import Linear
from efftune.linear.group import Group, pays
from efftune.nn import probe
from efftune.nn.attention import KEEP

PLAIN = (bool, int, float, str, type(None))


def install(model: nn.Module) -> list[RemovableHandle]:
    """Lets layers of one module that turn out to read one tensor work as one. Returns what takes that out again."""
    handles = []
    for module in model.modules():
        widths = Counter(child.in_features for child in module._modules.values() if type(child) is Linear)
        if widths and max(widths.values()) > 1 and is_known(module) and not installed(module):
            handles += Siblings(module).handles
    return handles


def is_known(module: nn.Module) -> bool:
    """Whether the module's code is that of transformers or ours. Other code may remember, in a cache of its own or in a
    list, what it makes in the outline run: tensors without data."""
    return type(module).__module__.partition(".")[0] in ("transformers", "efftune")


def installed(module: nn.Module) -> bool:
    return any(isinstance(getattr(hook, "__self__", None), Siblings) for hook in module._forward_hooks.values())


# What has been found, by `outward`. Were it wrong for a module, that would cost time and nothing else.
FOUND: dict[tuple, list[list[str]]] = {}


def outward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Returns a key of what a block and its call have in common with those of the next block: the code, the settings
    and the kinds of parts, without numbers and without the place in the model."""
    parts = [
        (name, vars(m).get("forward"), *probe.code(m), *_settings(m), *_kinds(m._parameters.values()))
        for name, m in module.named_modules()
    ]
    given = [*args, *kwargs.values()]
    first: dict[int, int] = {}
    same = tuple([first.setdefault(id(value), i) for i, value in enumerate(given)])
    return *parts, _settings(getattr(module, "config", None)), tuple(kwargs), tuple(_kinds(given)), same


def _settings(of: Any) -> tuple:
    settings = vars(of).items() if hasattr(of, "__dict__") else ()
    return type(of), *[(k, v) for k, v in settings if isinstance(v, PLAIN) and k != "layer_idx"]


def _kinds(values: Iterable[Any]) -> list:
    return [(v.dtype, v.ndim) if isinstance(v, Tensor) else v if isinstance(v, PLAIN) else type(v) for v in values]


class Siblings:
    """The hooks on a module. They hold names, so that a copy of the module, or another layer in the place of one, has
    its own groups."""

    def __init__(self, module: nn.Module) -> None:
        self.names: list[list[str]] | None = None  # None: the module has not run yet
        self.handles = [
            module.register_forward_pre_hook(self.begin, with_kwargs=True),
            module.register_forward_hook(self.end, always_call=True),
        ]

    @on_parameters
    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if is_compiling() or torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled():
            return
        if True not in [pays(x) for x in (*args, *kwargs.values())]:
            return  # what its layers read is no larger than what it is called with
        if self.names is None:
            if detect_fake_mode() is not None:
                return  # nothing to learn from a call that somebody else makes with fake tensors
            key = outward(module, args, kwargs)
            if key not in FOUND:
                FOUND[key] = readers(module, args, kwargs)
            self.names = FOUND[key]
            if not self.names:
                for handle in self.handles:
                    handle.remove()
        for names in self.names:
            layers: Any = [module._modules.get(name) for name in names]
            group = Group([m for m in layers if type(m) is Linear and m._compiled_call_impl is None])
            for layer in group.layers:
                layer.__dict__["group"] = group  # past the tests of nn.Module's __setattr__

    @on_parameters
    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        for names in () if is_compiling() else self.names or ():
            for name in names:
                if (layer := module._modules.get(name)) is not None:
                    vars(layer).pop("group", None)


def readers(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[list[str]]:
    """Returns the names of linear layers in the module that read one tensor when it is called so, a list for each
    tensor: those that are called once, with the very same tensor, unchanged between."""
    calls: list[tuple[nn.Module, Tensor, int]] = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # functions may hold tensors, too
    with mode:
        recorders = {name: Recorder(m, calls) for name, m in module._modules.items() if type(m) in (Linear, nn.Linear)}
    copy, given = probe.outline(module, mode, **recorders), probe.outline((args, kwargs), mode)
    if copy is None or given is None:
        return []
    for part in copy.modules():
        if not isinstance(part, OURS):
            vars(part).pop(KEEP, None)  # attention as the model has it: there is nothing to keep
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), probe.undisturbed(copy), mode:
        try:
            copy.forward(*given[0], **given[1])
        except Exception:  # it looks at values, which fake tensors do not have
            return []
    names: dict[nn.Module, str] = {recorder: name for name, recorder in recorders.items()}
    counts, found = Counter(layer for layer, _, _ in calls), dict[tuple[int, int], list[str]]()
    for layer, x, version in calls:
        if counts[layer] == 1:
            found.setdefault((id(x), version), []).append(names[layer])
    return [group for group in found.values() if len(group) > 1]


class Recorder(nn.Module):
    """Stands in the place of a linear layer, writes down what it is given, and gives a tensor of the right shape."""

    def __init__(self, layer: Any, calls: list[tuple[nn.Module, Tensor, int]]):
        super().__init__()
        self.in_features, self.out_features, self.calls = layer.in_features, layer.out_features, calls
        tensors, dtype = ((layer.weight,), layer.weight.dtype) if type(layer) is nn.Linear else layer.stored()[::2]
        shape, device = (layer.out_features, layer.in_features), tensors[0].device
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = None if layer.bias is None else nn.Parameter(self.weight.new_empty(layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self, x, x._version))
        return x.new_empty(*x.shape[:-1], self.out_features)
