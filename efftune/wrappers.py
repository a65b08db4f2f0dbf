"""Modules around modules: torch.compile's are taken off, and what cannot be changed in place is refused."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from efftune.errors import EfftuneError
from efftune.hooks import HOOKS, STATE_HOOKS

_INSIDE, _CONTEXT, _IN_PLACE = "_orig_mod", "dynamo_ctx", "_compiled_call_impl"
_SEVERAL_DEVICES = (
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
)


def inside(module: nn.Module) -> nn.Module | None:
    """The module that torch.compile has wrapped, or None where `module` is no such wrapper."""
    return module._modules.get(_INSIDE) if _CONTEXT in vars(module) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` as it is without torch.compile's wrappers, to be read: itself where it has none, else a copy of the tree
    of modules, which shares parameters, buffers and everything else with it."""
    if not any(inside(module) is not None for module in model.modules()):
        return model
    made: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if (compiled := inside(module)) is not None:
            return twin(compiled)
        if id(module) not in made:
            # Not by copy.copy, which parametrized modules refuse; into the dictionary, since a module's own __setattr__
            # may write somewhere else.
            copied = made[id(module)] = object.__new__(type(module))
            vars(copied).update(vars(module))
            vars(copied)["_modules"] = {n: m if m is None else twin(m) for n, m in module._modules.items()}
        return made[id(module)]

    return twin(model)


def is_compiled(module: nn.Module) -> bool:
    """Whether it is compiled in place, as by `nn.Module.compile`."""
    return vars(module).get(_IN_PLACE) is not None


def compile_in_place(model: nn.Module) -> nn.Module:
    """Takes each module below `model` that torch.compile has wrapped out of its wrapper, and compiles it in place with
    the wrapper's settings. Returns `model`, or what was in it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and inside(child) is not None and inside(parent) is None:
                parent._modules[name] = _unwrapped(child)
    return model if inside(model) is None else _unwrapped(model)


def _unwrapped(module: nn.Module) -> nn.Module:
    from torch._dynamo.external_utils import wrap_inline

    while (inner := inside(module)) is not None:
        if not is_compiled(inner):  # the function between is for torch's own modules, whose frames Dynamo skips
            vars(inner)[_IN_PLACE] = vars(module)[_CONTEXT](wrap_inline(inner._call_impl))
        module = inner
    return module


def refuse_wrapped(model: nn.Module) -> None:
    """Raises: EfftuneError, naming the module, where a recipe could not change `model` in place: wrappers for several
    devices hold on to the parameters that they began with, PEFT's layers have an adapter, a torch.jit module has its
    code fixed, weights that
    accelerate has offloaded are somewhere else, and hooks on torch.compile's wrapper would go with it."""
    for name, module in model.named_modules():
        what = f"{name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
        if any(base.__name__ in _SEVERAL_DEVICES for base in type(module).__mro__):
            raise EfftuneError(
                f"{what} is wrapped for several devices and would not see new parameters; apply the recipe to the "
                "module inside, and wrap it afterwards."
            )
        if type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer"):
            raise EfftuneError(
                f"{what} is a layer of PEFT's with an adapter; load the adapter by efftune.load onto the plain model, "
                "or merge it first (merge_and_unload)."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise EfftuneError(
                f"{what} is a torch.jit module, whose code is fixed; apply the recipe to the Python module that it was "
                "made from."
            )
        if inside(module) is not None and any(getattr(module, kind) for kind in (*HOOKS, *STATE_HOOKS)):
            raise EfftuneError(
                f"{what} is torch.compile's wrapper, which is taken off, and has hooks of its own; register them on "
                "the module inside."
            )
        if "_hf_hook" in vars(module) and any(p.is_meta for p in cast(nn.Module, module).parameters(recurse=False)):
            raise EfftuneError(
                f"accelerate has offloaded the weights of {what}; load the model onto one device, without a device_map."
            )
