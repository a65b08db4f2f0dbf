"""Nothing: backward keeps nothing of the input."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.contracts import Keep


@dataclass(frozen=True)
class Nothing(Keep):
    """Keeps no element of z, so only deltas that never ask for gᵀ·z work with it: NoDelta, and LoRA with A frozen."""

    keeps = False

    def save(self, z, source, seed):
        return ()

    def operands(self, g, kept):
        raise RuntimeError("keep=Nothing() has no input to take a weight gradient from.")
