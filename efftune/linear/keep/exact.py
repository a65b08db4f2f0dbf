"""Exact: backward keeps the input itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efftune.linear.contracts import Keep
from efftune.linear.handle import load


@dataclass(frozen=True)
class Exact(Keep):
    """Keeps z: M·K elements, no copy (one storage however many layers read the same input). Of an input that backward
    can make again (a norm's output, act(gate)·up) it keeps what that takes, and gets the same bits."""

    restores = True

    def save(self, z, source, seed):
        return (z,) if source is None or source.handle is None else (source.handle.keep(),)

    def weight_grad(self, g, kept):
        return product_t(g, load(kept[0]))

    def hold(self, z, seed, stream=0):
        return z


def product_t(g: Tensor, z: Tensor) -> Tensor:
    """gᵀ·z."""
    # For few columns (a LoRA rank) gᵀ is laid out first: on the CPU the product then runs at its full rate, and the
    # copy is small, M·S elements. A GPU reads either layout.
    g_t = g.t()
    return torch.mm(g_t.contiguous() if g.is_cpu and 8 * g.shape[1] <= z.shape[1] else g_t, z)
