"""Samples of gradients, and gradients that are dropped again: what methods measure themselves by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

STRIDE, AT_LEAST = 97, 64  # every 97th entry of a weight's gradient is sampled, and of a small one about 64


def _stride(parameter: Tensor) -> int:
    return min(STRIDE, max(1, parameter.numel() // AT_LEAST))


def inverse_share(parameter: Tensor) -> float:
    """Returns the factor that makes a sum over the sampled entries an estimate of the sum over all entries."""
    return parameter.numel() / len(range(0, parameter.numel(), _stride(parameter)))


def distance(a: Tensor, b: Tensor, parameter: Tensor) -> Tensor:
    """Returns ‖a − b‖² of two gradients of `parameter`, estimated from their sampled entries."""
    return (a - b).square().sum(dtype=torch.float64) * inverse_share(parameter)


@contextmanager
def sampled_gradients(parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that each backward pass within fills: name -> the sampled entries of its gradient, in float32."""
    seen: dict[str, Tensor] = {}

    def look(name: str, stride: int):
        def hook(g: Tensor) -> None:
            seen[name] = g.reshape(-1)[::stride].float().clone()

        return hook

    handles = [p.register_hook(look(name, _stride(p))) for name, p in parameters.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def discarding(model: nn.Module) -> Iterator[None]:
    """Drops the gradients of backward passes within, each as soon as it is there, and puts those of before back."""
    held = [(p, p.grad) for p in model.parameters() if p.requires_grad]

    def drop(p: Tensor) -> None:
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p, _ in held]
    for p, _ in held:
        p.grad = None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, grad in held:
            p.grad = grad
