"""The parts of a transformer block around its linear layers, swapped on the instance and back.

Norms, gated MLPs, activations, the attention of Hugging Face models and its rotary embedding are recognised by what
they compute, not by their class: a candidate is tried on a few numbers against the formula, and left alone where it
computes something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from efftune.hooks import hooked
from efftune.interop.transformers import attention, eager_attention, rotary
from efftune.linear import Exact
from efftune.linear.contracts import Keep
from efftune.nn import probe
from efftune.nn.attention import KEEP
from efftune.nn.eager_attention import ROWS
from efftune.nn.glu import Activation, GatedMLP
from efftune.nn.norm import LayerNorm, RMSNorm
from efftune.ops.glu import ACTIVATIONS, composition
from efftune.wrappers import is_compiled

Known = dict[Any, tuple[Any, Any]]  # what was found on stand-ins, and what is held for it: many modules are alike
OURS = (RMSNorm, LayerNorm, GatedMLP, Activation)
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Blocks:
    """What `install` changed, and the way back."""

    swaps: list[tuple[nn.Module, str, nn.Module, nn.Module]] = field(default_factory=list)  # parent, name, old, new
    attention: list[tuple[nn.Module, Keep | None]] = field(default_factory=list)  # and its keep of before
    rows: list[nn.Module] = field(default_factory=list)  # attention that estimates dk and dv from some query rows
    rotary: list[RemovableHandle] = field(default_factory=list)  # hooks of rotary embeddings
    groups: list[RemovableHandle] = field(default_factory=list)  # hooks of modules around layers that work as one

    def remove(self) -> None:
        for parent, name, old, new in reversed(self.swaps):
            if parent._modules.get(name) is new:
                for child in old._modules.keys() & new._modules.keys():
                    old._modules[child] = new._modules[child]  # layers may have been swapped since
                parent._modules[name] = old.train(new.training)
        for module, before in self.attention:
            if before is not None:
                setattr(module, KEEP, before)
            else:
                vars(module).pop(KEEP, None)
        for module in self.rows:
            vars(module).pop(ROWS, None)
        for hook in (*self.rotary, *self.groups):
            hook.remove()
        vars(self).update(vars(Blocks()))

    def __str__(self) -> str:
        kinds: dict[str, int] = {}
        for _, _, _, new in self.swaps:
            kinds[type(new).__name__] = kinds.get(type(new).__name__, 0) + 1
        kinds |= {"attention": len(self.attention)} if self.attention else {}
        kinds |= {"rotary": len(self.rotary)} if self.rotary else {}
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"


# Only for tests of what is not recognition, which apply to hundreds of models of the same code: what was found for
# modules whose stand-ins are made of code and settings alone, for the life of the process. Code may change in it.
SHARED: Known | None = None


@torch.no_grad()
def install(model: nn.Module, keep: Keep | None = None) -> Blocks:
    """Swaps norms, gated MLPs and activations inside `model` for those of efftune.nn, and routes the attention of a
    transformers model through `attention` (sdpa) or `eager_attention` and its rotary embedding through `rotary`.
    Parameters are shared and keep their names."""
    done = Blocks()
    with probe.at_home():
        _swap(model, keep, done)
        _install_attention(model, keep, done)
        _install_rotary(model, done)
    return done


def _swap(model: nn.Module, keep: Keep | None, done: Blocks) -> None:
    twins: dict[nn.Module, nn.Module | None] = {}  # a module that stands in two places stays one
    known: Known = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is None or hooked(child):
                continue
            if type(child) in OURS:
                child.keep = cast(Any, keep or child.keep)  # of an earlier recipe, or the model's own
                continue
            if child not in twins:
                twins[child] = twin(child, keep or Exact(), known)
            new = twins[child]
            if new is not None:
                parent._modules[name] = new.train(child.training)
                done.swaps.append((parent, name, child, new))


def twin(module: nn.Module, keep: Keep, known: Known) -> nn.Module | None:
    """Returns the module of efftune.nn that computes what `module` does, over the same parameters and with its
    attributes (an epsilon under another name, sizes, act_fn), which other code may read; None if there is none."""
    new = _same(module, keep, known)
    if new is not None:
        children = {name: child for name, child in module._modules.items() if name not in new._modules}
        for name, value in (vars(module) | children).items():
            vars(new).setdefault(name, value)
    return new


def _same(module: nn.Module, keep: Keep, known: Known) -> nn.Module | None:
    kind = type(module)
    if any(p.is_meta for p in module.parameters()) or is_compiled(module):
        return None
    if kind is nn.LayerNorm and len(cast(nn.LayerNorm, module).normalized_shape) == 1:
        layer = cast(nn.LayerNorm, module)
        return LayerNorm(layer.weight, layer.bias, layer.eps, keep)
    if kind.__name__.endswith("RMSNorm"):
        found = _once(known, _offset, module)
        if found is None:
            return None
        eps, offset, promotes = found
        return RMSNorm(module._parameters["weight"], eps, offset, keep, promotes)
    if set(GATED) <= set(module._modules) <= {*GATED, "act_fn"}:
        parts: list[Any] = [getattr(module, name) for name in GATED]
        if not all(hasattr(part, "in_features") for part in parts):
            return None
        activation = _once(known, _gated, module, GATED)
        return activation and GatedMLP(*parts, activation=activation, keep=keep)
    if not module._modules and not module._parameters and not module._buffers:
        activation = _once(known, recognise, module)
        if activation is None or (activation == "relu" and not keep.random):
            return None  # torch's ReLU keeps its output, which the next layer reads anyway
        return Activation(activation, keep)
    return None


def _once(known: Known, question: Callable[[Any], Any], module: nn.Module, children: tuple[str, ...] = ()) -> Any:
    """Returns question(module), which is asked once of modules that have the same stand-in."""
    key = probe.likeness(module, *children)
    if key is None:
        return None
    if SHARED is not None and not any(isinstance(part, Tensor | nn.Module) for part in key[1]):
        known = SHARED
    if (question, key[0]) not in known:
        known[question, key[0]] = question(module), key[1]
    return known[question, key[0]][0]


def _offset(module: nn.Module) -> tuple[float, float, bool | None] | None:
    """Returns the eps and the offset with which the module is an RMSNorm, and whether it promotes; None if it is
    none."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers and probe.takes_one(module)
    if weight is None or weight.ndim != 1 or not isinstance(eps, float) or not alone:
        return None
    old, width = probe.stand_in(module), len(weight)
    if old is None:
        return None
    for offset in (0.0, 1.0):
        if probe.same(old, RMSNorm(old.weight, eps, offset), width):
            return eps, offset, probe.promotes(old, width)
    return None


def _gated(module: nn.Module) -> str | None:
    """Returns the activation with which the module is a gated MLP; None if it is none."""
    act = getattr(module, "act_fn", None)
    activation = recognise(cast(Callable[[Tensor], Tensor], act)) if callable(act) else None
    if activation is None or module._parameters or module._buffers or not probe.takes_one(module):
        return None
    small = probe.linear(16, 8, 0), probe.linear(16, 8, 1), probe.linear(8, 16, 2)
    old = probe.stand_in(module, **dict(zip(GATED, small, strict=True)))
    return activation if old is not None and probe.same(old, GatedMLP(*small, activation), 8) else None


def recognise(act: Callable[[Tensor], Tensor]) -> str | None:
    """Returns the name under which `glu` knows the element-wise function `act`, or None."""
    if isinstance(act, nn.Module) and (
        act._modules or act._parameters or act._buffers or hooked(act) or not probe.takes_one(act)
    ):
        return None
    old = probe.stand_in(act)
    if old is None:
        return None
    return next(
        (name for name in ACTIVATIONS if probe.same_function(old, partial(composition, up=None, activation=name))), None
    )


def _install_attention(model: nn.Module, keep: Keep | None, done: Blocks) -> None:
    sdpa = [
        module
        for module in model.modules()
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == "sdpa"
        and hasattr(module, "is_causal")
    ]
    eager = eager_attention.modules(model)
    for module in (*sdpa, *eager):
        before = getattr(module, KEEP, None)
        setattr(module, KEEP, keep or before or Exact())
        done.attention.append((module, before))
    if sdpa:
        attention.register()
    if eager:
        eager_attention.register()


def _install_rotary(model: nn.Module, done: Blocks) -> None:
    if not rotary.register({type(module) for module in model.modules()}):
        return
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding") and rotary.mark not in module._forward_hooks.values():
            done.rotary.append(module.register_forward_hook(rotary.mark))
