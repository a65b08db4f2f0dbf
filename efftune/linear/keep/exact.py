"""Exact: backward keeps the input itself."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.contracts import Keep
from efftune.linear.handle import load


@dataclass(frozen=True)
class Exact(Keep):
    """Keeps z: M·K elements, no copy (one storage however many layers read the same input). Of an input that backward
    can make again (a norm's output, act(gate)·up) it keeps what that takes, and gets the same bits."""

    restores = True

    def save(self, z, source, seed):
        return (z,) if source is None or source.handle is None else (source.handle.keep(),)

    def operands(self, g, kept):
        return g, load(kept[0])

    def hold(self, z, seed, stream=0):
        return z
