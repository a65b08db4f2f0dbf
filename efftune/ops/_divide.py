"""Division whose result is the same on every device."""

from __future__ import annotations

from torch import Tensor


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once. By a Python number, as by any 0-d tensor that lies on the CPU, torch's CUDA kernel divides
    with a product by the rounded reciprocal, whose last bit is another one: enough for another scale or code."""
    return x / x.new_full((), by)
