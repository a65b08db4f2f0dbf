"""Hooks on modules: whether somebody watches a call or the state dict, and hooks that change a module's parameters
while it is called."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
STATE_METHODS = ("_save_to_state_dict", "_load_from_state_dict", "state_dict", "load_state_dict", "get_extra_state")
MARK = "on_parameters"


def on_parameters(hook: Callable) -> Callable:
    """Marks a hook that changes the module's own parameters around a call, and neither sees nor changes what goes in or
    comes out: whoever computes the call another way lets it run by `called`."""
    setattr(hook, MARK, True)
    return hook


def watched(module: nn.Module) -> bool:
    """Whether somebody sees, or changes, what goes into the module or comes out."""
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    return not all(hasattr(hook, MARK) for hook in hooks) or "forward" in vars(module)  # accelerate replaces forward


def hooked(module: nn.Module, by: type[nn.Module] = nn.Module) -> bool:
    """Whether a module of class `by` that took its place would lack something: what watches it, or what it does to its
    state dict."""
    has_state_methods = any(getattr(type(module), name) is not getattr(by, name) for name in STATE_METHODS)
    return has_state_methods or watched(module) or any(getattr(module, kind) for kind in STATE_HOOKS)


def called(module: nn.Module, compute: Callable[[], Any]) -> Any:
    """compute(), as if it were the module's forward: its hooks run around it."""
    if not any(getattr(module, kind) for kind in HOOKS):
        return compute()

    def forward() -> Any:
        del module.forward  # compute may call the module itself
        return compute()

    module.forward = forward
    try:
        return module()
    finally:
        vars(module).pop("forward", None)  # where a hook raised before it was called


@contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Within it the module is called without its forward hooks."""
    kept = {kind: hooks for kind in HOOKS[:2] if (hooks := getattr(module, kind))}
    for kind in kept:
        setattr(module, kind, OrderedDict())
    try:
        yield
    finally:
        for kind, hooks in kept.items():
            setattr(module, kind, hooks)
