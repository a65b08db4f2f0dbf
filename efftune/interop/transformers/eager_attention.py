"""The attention of transformers' models that run with attn_implementation="eager", routed through ours."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from efftune.nn import probe
from efftune.nn.attention import KEEP
from efftune.nn.eager_attention import ROWS, eager_attention, why_not

_COMMON = ("module", "query", "key", "value", "attention_mask", "scaling", "dropout", "kwargs")
_known: weakref.WeakKeyDictionary[nn.Module, Callable | None] = weakref.WeakKeyDictionary()
_interface: Any = None


def own_function(module: nn.Module) -> Callable | None:
    """Returns the eager function of an attention module of transformers, if it computes what `eager_attention` does,
    else None. It is looked for where the module's forward looks, and tried on a few numbers."""
    if module not in _known:
        forward = inspect.unwrap(type(module).forward)
        names, values = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
        found = values.get("eager_attention_forward")
        _known[module] = (
            found if names and "eager_attention_forward" in names.co_names and _same(found, module) else None
        )
    return _known[module]


@torch.no_grad()
def _same(function: Any, module: nn.Module) -> bool:
    """Whether `function` computes what `eager_attention` does, for weights of the module's own that are random, in
    training and evaluation mode, for scores so large that a cap shows, in float32 and bfloat16, with dropout in
    training and without."""
    groups = getattr(module, "num_key_value_groups", 1)
    # No copy of the projections' weights: a function that asks for a child with parameters is something else.
    heavy = {name: None for name, m in module._modules.items() if m is not None and any(True for _ in m.parameters())}
    module = probe.stand_in(module, **heavy)
    if module is None:
        return False
    g = torch.Generator().manual_seed(0)
    q, k, v, mask = (
        torch.randn(shape, generator=g, device="cpu").mul_(size)
        for shape, size in (((2, 2 * groups, 5, 8), 3), ((2, 2, 6, 8), 3), ((2, 2, 6, 8), 1), ((2, 1, 5, 6), 5))
    )
    kinds = [(1.0, torch.float32), (20.0, torch.float32), (1.0, torch.bfloat16)]
    for (scale, dtype), training in itertools.product(kinds, (True, False)):
        module.training = training
        given = [t.to(dtype) for t in (q * scale, k * scale, v)]
        call = partial(function, module, *given, scaling=0.5)
        masks = (mask.to(dtype), None)
        try:
            with probe.undisturbed(module) as untouched:
                found = [call(attention_mask=m, dropout=0.0) for m in masks]
                if not training:
                    found += [call(attention_mask=masks[0], dropout=0.5)]
                quiet = untouched()
                with torch.random.fork_rng(devices=[]):
                    out, dropped = call(attention_mask=masks[0], dropout=0.5)
                if not (quiet and untouched()):
                    return False
        except Exception:  # it wants other arguments, so it is something else
            return False
        expected = [eager_attention(given[0], given[1], given[2], m, scale=0.5) for m in (*masks, masks[0])]
        pairs = [pair for got, right in zip(found, expected, strict=False) for pair in zip(got, right, strict=True)]
        if training and dtype == torch.float32:
            wide = v.repeat_interleave(groups, 1)
            pairs += [
                (dropped, torch.where(dropped == 0, 0.0, 2 * found[0][1])),
                (out, (dropped @ wide).transpose(1, 2)),
            ]
            if not (dropped == 0).any():
                return False
        if not all(probe.near(a, b, 16.0) for a, b in pairs):
            return False
    return True


def modules(model: nn.Module) -> list[nn.Module]:
    """Returns the attention modules of a transformers model that run with eager attention and can be routed through
    ours."""
    eager = [m for m in model.modules() if getattr(getattr(m, "config", None), "_attn_implementation", None) == "eager"]
    return [m for m in eager if own_function(m) is not None]


def register() -> None:
    """Puts a switch behind transformers' choice of an attention function: modules with a `KEEP` or `ROWS` get
    `eager_attention`, all others the very function that they would have had. "eager" is in no registry; the function
    comes from the model's own file, as the default of this choice. The model's config goes on to say "eager"."""
    global _interface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _interface is None:
        _interface = ALL_ATTENTION_FUNCTIONS.get_interface
        vars(ALL_ATTENTION_FUNCTIONS)["get_interface"] = _choose


def _choose(implementation: str, default: Callable) -> Callable:
    found = _interface(implementation, default)
    return partial(_switch, found) if implementation == "eager" else found


def _switch(original: Callable, module: Any, *args, **kwargs):
    ours = hasattr(module, KEEP) or hasattr(module, ROWS)
    if torch.compiler.is_compiling() or not ours or own_function(module) is not original:
        return original(module, *args, **kwargs)
    return for_transformers(original, module, *args, **kwargs)


def for_transformers(
    original: Callable, module: Any, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **rest
):
    """Computes attention with the arguments of transformers' attention interface. What `eager_attention` cannot do goes
    to the model's own function: a softcap, a position bias, and whatever else that function takes and is given."""
    q, k, v, device = query, key, value, query.device.type
    if torch.is_autocast_enabled(device):
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    more = inspect.signature(original).parameters.keys() - _COMMON
    if (
        scaling is None
        or any(rest.get(name) is not None for name in more)
        or why_not(q, k, v, attention_mask) is not None
    ):
        return original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest)
    with torch.autocast(device, enabled=False):
        return eager_attention(
            q, k, v, attention_mask, scale=scaling, dropout=dropout if module.training else 0.0,
            keep=getattr(module, KEEP, None), rows=getattr(module, ROWS, None),
        )  # fmt: skip
