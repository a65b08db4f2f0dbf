"""Exact: backward keeps the input itself."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.contracts import Keep


@dataclass(frozen=True)
class Exact(Keep):
    """Keeps z: M·K elements, no copy (one storage however many layers read the same input)."""

    def save(self, z, seed):
        return (z,)

    def weight_grad(self, g, kept):
        # For few columns (a LoRA rank) gᵀ is laid out first: on the CPU the product then runs at its full rate, and the
        # copy is small, M·S elements.
        g_t = g.t()
        return (g_t.contiguous() if 8 * g.shape[1] <= kept[0].shape[1] else g_t) @ kept[0]
