"""Where a NaN or an Inf began: the failed step once more, with hooks on every module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

NOT_AGAIN = "it did not appear again when the step was repeated"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)


def _bad(value: Any) -> bool:
    # a mask may hold -inf on purpose, so an input counts as bad only where it is NaN or +inf
    return any(bool((torch.isnan(t) | torch.isposinf(t)).any()) for t in _tensors(value))


class _Watcher:
    def __init__(self, model: nn.Module):
        self.model = model
        self.forward: str | None = None  # first module with a bad output, innermost first
        self.order: list[str] = []  # modules in the order in which their forward ended
        self.gradient: dict[tuple[str, str], bool] = {}  # (module, "in" | "out") -> is its gradient bad?

    def __enter__(self) -> _Watcher:
        self.handles = []
        for name, module in self.model.named_modules():
            self.handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.order.append(name)
            if self.forward is None and _bad(output):
                self.forward = name
            for side, value in (("in", (args, kwargs)), ("out", output)):
                for tensor in _tensors(value):
                    if tensor.requires_grad:
                        tensor.register_hook(lambda g, key=(name, side): self._saw(key, g))

        return hook

    def _saw(self, key: tuple[str, str], gradient: torch.Tensor) -> None:
        bad = not bool(torch.isfinite(gradient).all())
        self.gradient[key] = self.gradient.get(key, False) or bad

    def backward(self) -> str | None:
        """The innermost module that is given a good gradient and hands on, or gives its weights, a bad one."""
        made = []
        modules = dict(self.model.named_modules())
        for name in reversed(self.order):
            weights = [p.grad for p in modules[name].parameters(recurse=False) if p.grad is not None]
            hands_on = self.gradient.get((name, "in"), False) or any(not torch.isfinite(g).all() for g in weights)
            # no entry: no gradient came by this module's output, so the one of its input is not its doing
            if hands_on and self.gradient.get((name, "out")) is False:
                made.append(name)
        inner = [m for m in made if not any(other != m and (other.startswith(m + ".") or m == "") for other in made)]
        return inner[0] if inner else None


def locate(model: nn.Module, forward_backward: Callable[[], Any]) -> str:
    """Runs the step again and says where it breaks, as the end of a sentence."""
    bad_weights = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    for parameter in model.parameters():
        parameter.grad = None
    with _Watcher(model) as watcher:
        loss = forward_backward()
        where = watcher.backward()
    if watcher.forward is not None:
        cause = f" (its weights were already bad: {bad_weights[0]})" if bad_weights else ""
        return f"it first appears in the output of {_name(watcher.forward, model)}{cause}"
    if not torch.isfinite(torch.as_tensor(loss)).all():
        return "every module's output is finite: it first appears in the loss function"
    if where is not None:
        return f"the forward pass is finite: it first appears in the backward pass of {_name(where, model)}"
    if any(watcher.gradient.values()):
        return "the forward pass is finite: it first appears in the gradient of the loss function"
    return NOT_AGAIN


def _name(name: str, model: nn.Module) -> str:
    module = dict(model.named_modules())[name]
    return f"'{name}' ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"
