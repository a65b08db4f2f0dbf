"""The three axes of a Linear, y = base(W)·x + delta(x) while backward keeps keep(x), and what each of them promises.

A kind of base, delta or keep is a frozen dataclass that holds settings and no tensors; its tensors travel beside it in
flat tuples: `w` (the stored weight), `p` (what the delta adds), `kept` (what keep saved; here a handle may stand for a
tensor that is made again, see `handle.py`). Bases and keeps are leaves; the delta is the small program that calls them,
forward and backward. So every delta works with every base and every keep, and a new kind is one file.

Dims: M tokens, N out, K in, R rank. x is (M, K) and dy (M, N): the module flattens leading dimensions.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from efftune.linear.handle import Handle, Source

Tensors = tuple[Tensor, ...]
Kept = tuple[Tensor | Handle, ...]


class Need(NamedTuple):
    """Which gradients somebody will ask for: decided outside autograd.Function.forward, where grad mode is off."""

    x: bool
    bias: bool
    w: tuple[bool, ...]
    p: tuple[bool, ...]

    def any(self) -> bool:
        return self.x or self.bias or any(self.w) or any(self.p)


def brief(settings, name: str) -> str:
    """name(field=value, ...) of a dataclass, with the fields that differ from their defaults."""
    fields = [(f.name, getattr(settings, f.name), f.default) for f in dataclasses.fields(settings)]
    return f"{name}({', '.join(f'{field}={value!r}' for field, value, default in fields if value != default)})"


class Axis:
    def __str__(self) -> str:
        return brief(self, type(self).__name__)


class Base(Axis):
    """How the weight W (N, K) is stored."""

    names: ClassVar[tuple[str, ...]]  # of the tensors in w, as they appear in the state_dict
    trains: ClassVar[bool] = False  # whether gradient descent on the stored tensors means anything

    def store(self, weight: Tensor) -> Tensors:
        """weight (N, K), floating point -> w."""
        raise NotImplementedError

    def shape(self, w: Tensors) -> tuple[int, int]:
        """(N, K)."""
        raise NotImplementedError

    def dtype(self, w: Tensors) -> torch.dtype:
        """The floating-point dtype that W has when it is asked for."""
        raise NotImplementedError

    def linear(self, w: Tensors, x: Tensor, low_rank=None, bias=None, add=None) -> Tensor:
        """x·Wᵀ (+ h·Bᵀ, low_rank = (h (M, R), b (N, R))) (+ bias (N,)) (+ add (M, N), which it consumes) -> (M, N)."""
        raise NotImplementedError

    def linear_t(self, w: Tensors, dy: Tensor, low_rank=None, add=None) -> Tensor:
        """dy·W (+ dh·A, low_rank = (dh (M, R), a (R, K))) (+ add (M, K), which it consumes) -> a fresh (M, K)."""
        raise NotImplementedError

    def rows(self, w: Tensors, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """W[a:b] (b - a, K) in dtype."""
        raise NotImplementedError

    def weight_vjp(self, w: Tensors, dw_rows: Tensor, a: int, b: int) -> tuple[Tensor | None, ...]:
        """dL/dW[a:b] -> the gradients of rows a..b of what is stored, one per tensor in w."""
        raise NotImplementedError


class Keep(Axis):
    """What backward keeps of a tensor z (M, K) that a later weight gradient gᵀ·z needs."""

    keeps: ClassVar[bool] = True  # whether weight_grad can answer
    random: ClassVar[bool] = False  # draws; then `seed` is a 0-d int64 tensor on the CPU, else None
    restores: ClassVar[bool] = False  # whether `hold` can answer: what norms, activations and attention keep with

    def save(self, z: Tensor, source: Source | None, seed: Tensor | None) -> Kept:
        """z, or what stands for it. `source` is what is known about z: how backward can make it again, and what layers
        that read the same tensor took of it already; None where nothing is, and under torch.compile."""
        raise NotImplementedError

    def weight_grad(self, g: Tensor, kept: Kept) -> Tensor:
        """g (M, S), a column slice of a gradient as well as a whole one -> gᵀ·z̃ (S, K), exact or unbiased."""
        raise NotImplementedError

    def hold(self, z: Tensor, seed: Tensor | None, stream: int = 0) -> Tensor | Handle:
        """z (M, K) so that `handle.load` gives z̃: itself, or a handle to its codes. Several tensors that share a seed
        take different streams."""
        raise NotImplementedError


class Delta(Axis):
    """What is trained, and the order in which the layer's work is done."""

    names: ClassVar[tuple[str, ...]] = ()  # of the tensors in p
    trains: ClassVar[bool] = True
    random: ClassVar[bool] = False  # draws in training mode (may be a property)

    def init(self, base: Base, w: Tensors) -> Tensors:
        """Fresh p for the layer, on w's device."""
        return ()

    def trainable(self, base: Base, w: Tensors) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Which tensors of w and of p are parameters that train."""
        return (False,) * len(w), (True,) * len(self.names)

    def needs_keep(self) -> bool:
        """Whether some gradient of this delta needs what `keep` saves."""
        return True

    def eval(self) -> Delta:
        """The same delta as it acts in evaluation mode."""
        return self

    def bare(self) -> Delta:
        """The delta of the same layer once this one is taken out: itself where it is the stored weight that trains."""
        return self

    def why_not(self, base: Base, keep: Keep, shape: tuple[int, int]) -> str | None:
        """Why this delta cannot work over base and keep on a layer of (N, K): a sentence with the remedy, or None."""
        return None

    def forward(self, base, keep, x, bias, w, p, seed, need: Need, source: Source | None) -> tuple[Tensor, Kept]:
        """-> y (M, N), saved. Saves only what the gradients in `need` take; `source` is that of x, for keep.save."""
        raise NotImplementedError

    def backward(self, base, keep, dy, w, p, saved, seed, need: Need):
        """-> dx | None, gradients of w, gradients of p (None where not needed). The bias is the Function's business."""
        raise NotImplementedError

    def rows(self, p: Tensors, a: int, b: int) -> Tensor | None:
        """ΔW[a:b] in float32, or None where what is trained is the stored weight itself."""
        return None


def check(base: Base, delta: Delta, keep: Keep, shape: tuple[int, int]) -> str | None:
    """None, or why the three cannot be combined on a layer of (N, K), as a sentence with the remedy."""
    if not keep.keeps and delta.needs_keep():
        return f"{delta} needs the layer's input in backward and keep={keep} drops it; use keep=Exact()"
    return delta.why_not(base, keep, shape)
