"""The three axes of a Linear, y = base(W)·x + delta(x) while backward keeps keep(x), and what each of them promises.

A kind of base, delta or keep is a frozen dataclass that holds settings and no tensors. Its tensors travel beside it:
the stored weight in a `Stored`, what the delta adds in the tuple `p`, what keep saved in the tuple `kept` (where a
handle may stand for a tensor that is made again, see `handle.py`). Bases and keeps are leaves. The delta is the small
program that calls them, forward and backward, through one `Call`. So every delta works with every base and every keep,
and a new kind is one file.

Dims: M tokens, N out, K in, R rank. x is (M, K) and dy (M, N): the module flattens leading dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from efftune.linear.handle import Handle, Source
from efftune.ops.entries_linear import entries_linear, entries_linear_t

Tensors = tuple[Tensor, ...]
Kept = tuple[Tensor | Handle, ...]
Gradients = tuple[Tensor | None, ...]
SparseMatrix = Sequence[tuple[Tensor, Tensor]]  # a sum of (indices (S,) int32, n·K + k, sorted; values (S,) float32)


class Need(NamedTuple):
    """Which gradients somebody will ask for: decided outside autograd.Function.forward, where grad mode is off."""

    x: bool
    bias: bool
    w: tuple[bool, ...]
    p: tuple[bool, ...]

    def any(self) -> bool:
        return self.x or self.bias or any(self.w) or any(self.p)


class Stored(NamedTuple):
    """W as a layer holds it: the base's tensors, and what cannot be read off them."""

    tensors: Tensors
    shape: tuple[int, int]  # (N, K)
    dtype: torch.dtype  # the floating-point dtype that W has when it is asked for


def brief(settings, name: str, show: Callable[[Any], str] = repr) -> str:
    """Writes a dataclass as name(field=value, ...), with the fields that differ from their defaults."""
    fields = [(f.name, getattr(settings, f.name), f.default) for f in dataclasses.fields(settings)]
    return f"{name}({', '.join(f'{field}={show(value)}' for field, value, default in fields if value != default)})"


class Axis:
    def __str__(self) -> str:
        return brief(self, type(self).__name__)


class Base(Axis):
    """How the weight W (N, K) is stored, and what the product with it is taken of."""

    names: ClassVar[tuple[str, ...]]  # of the stored tensors, as they appear in the state_dict
    learns: ClassVar[tuple[str, ...]] = ()  # those that gradient descent means something for
    fixed: ClassVar[tuple[str, ...]] = ()  # floating-point ones that are no parameters, and keep their dtype in `.to()`
    trains: ClassVar[bool] = False  # whether what learns can make W any matrix

    def store(self, weight: Tensor) -> Tensors:
        """Returns the tensors that stand for `weight` (N, K), a floating-point tensor."""
        raise NotImplementedError

    def refuse(self, weight: Tensor) -> None:
        """Raises what `store` would raise for `weight` (N, K): `efftune.apply` asks for every layer before it changes
        the first. What does not override it stores the weight once more and drops the result; a base that can tell by
        a look at the weight says so here."""
        self.store(weight)

    def adopt(self, module: nn.Module) -> Stored | None:
        """Returns what `module`, a linear layer of torch or of another library, stores already, in this base's layout:
        shared where that is the same, and with no dense W in between. None where it is no layer whose storage this base
        has. (The bias is `module.bias`, or None.)
        """
        return None

    def dtype(self, tensors: Tensors) -> torch.dtype | None:
        """Returns the dtype of W that the stored tensors tell, another one after `.to()`. None where they do not tell
        it, and W keeps the dtype that it had when it was stored."""
        return None

    def enter(self, w: Stored, x: Tensor) -> Tensor:
        """Returns z (M, K'), what the product is taken of: x itself, or x rotated or rounded (straight-through
        training)."""
        return x

    def leave(self, w: Stored, dz: Tensor) -> Tensor:
        """Returns dL/dx (M, K) for dL/dz (M, K'), which it may consume."""
        return dz

    def linear(self, w: Stored, z: Tensor, low_rank=None, bias=None, add=None, entries: SparseMatrix = ()) -> Tensor:
        """Returns z·Wᵀ (+ h·Bᵀ) (+ bias) (+ add) (+ z·Sᵀ), (M, N), for low_rank = (h (M, R), b (N, R)), bias (N,), add
        (M, N), which it consumes, and S the sum of matrices that are 0 but for some entries."""
        raise NotImplementedError

    def linear_t(self, w: Stored, dy: Tensor, low_rank=None, add=None, entries: SparseMatrix = ()) -> Tensor:
        """Returns dy·W (+ dh·A) (+ add) (+ dy·S), a fresh (M, K), for low_rank = (dh (M, R), a (R, K)), add (M, K),
        which it consumes, and S as in `linear`."""
        raise NotImplementedError

    def rows(self, w: Stored, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """Returns W[a:b] (b - a, K) in dtype, of the matrix that a plain layer would have."""
        raise NotImplementedError

    def put(self, w: Stored, index: Tensor, values: Tensor) -> None:
        """Writes into the stored weight: W[n, k] = values[s] for n·K + k = index[s].

        index (S,), int32 or int64, no place twice; values (S,), floating-point, rounded once to W's dtype. Neither
        autograd nor the version of a tensor tells of it. Only a base whose every entry can be any number of W's dtype
        has it. Codes cannot be written so: a change below half of their step would be lost.
        """
        raise NotImplementedError

    @property
    def puts(self) -> bool:
        """Whether entries of W can be written, which a delta that W holds asks for."""
        return type(self).put is not Base.put

    def weight_vjp(self, w: Stored, dw_rows: Tensor, a: int, b: int) -> Gradients:
        """Turns dL/dW[a:b], of W as the product with z has it, into the gradients of rows a..b of the stored tensors,
        or of a whole tensor that has no rows of its own (then the parts are summed up). None where there is none."""
        raise NotImplementedError


class Keep(Axis):
    """What backward keeps of a tensor z (M, K) that a later weight gradient gᵀ·z needs."""

    keeps: ClassVar[bool] = True  # whether operands and weight_grad can answer
    random: ClassVar[bool] = False  # draws; then `seed` is a 0-d int64 tensor on the CPU, else None
    restores: ClassVar[bool] = False  # whether `hold` can answer: what norms, activations and attention keep with

    def save(self, z: Tensor, source: Source | None, seed: Tensor | None) -> Kept:
        """Returns z, or what stands for it. `source` is what is known about z: how backward can make it again, and what
        layers that read the same tensor took of it already; None where nothing is, and under torch.compile."""
        raise NotImplementedError

    def shared(self, rows: int, source: Source | None) -> bool:
        """Whether all layers that read one tensor of so many rows save the same of it, whatever their seeds are. Only
        then can they work as one."""
        return not self.random

    def operands(self, g: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        """Returns g̃ (L, S) and z̃ (L, K), L ≤ M, with gᵀ·z = g̃ᵀ·z̃ for g (M, S), exactly or in the mean over the
        seed. A delta contracts them in tiles, factors or entries; a kept input is made again once for all of these."""
        raise NotImplementedError

    def weight_grad(self, g: Tensor, kept: Kept) -> Tensor:
        """Returns gᵀ·z̃ (S, K) for g (M, S), exact or unbiased."""
        return product_t(*self.operands(g, kept))

    def hold(self, z: Tensor, seed: Tensor | None, stream: int = 0) -> Tensor | Handle:
        """Returns z (M, K) itself, or a handle to its codes: what `handle.load` turns into z̃. Several tensors that
        share a seed take different streams."""
        raise NotImplementedError


def product_t(g: Tensor, z: Tensor) -> Tensor:
    """Returns gᵀ·z (S, K) for g (M, S) and z (M, K)."""
    # For few columns (a LoRA rank) gᵀ is laid out first: on the CPU the product then runs at its full rate, and the
    # copy is small, M·S elements. A GPU reads either layout.
    g_t = g.t()
    return torch.mm(g_t.contiguous() if g.is_cpu and 8 * g.shape[1] <= z.shape[1] else g_t, z)


def plus_entries(y: Tensor, x: Tensor, entries: SparseMatrix) -> Tensor:
    """Returns y (M, N), which it writes to, + x·Sᵀ."""
    for indices, values in entries:
        entries_linear(y, x, indices, values)
    return y


def plus_entries_t(dx: Tensor, dy: Tensor, entries: SparseMatrix) -> Tensor:
    """Returns dx (M, K), which it writes to, + dy·S."""
    for indices, values in entries:
        entries_linear_t(dx, dy, indices, values)
    return dx


def add_entries(w: Tensor, entries: SparseMatrix) -> Tensor:
    """Returns w, contiguous, after w += S, each entry rounded once to w's dtype."""
    for indices, values in entries:
        flat, indices = w.view(-1), indices.long()
        flat[indices] = (flat[indices].to(values.dtype) + values).to(w.dtype)
    return w


class Call(NamedTuple):
    """One call of a layer, forward or backward: all that a delta works with. A new thing to know is a field here and no
    argument of every kind."""

    base: Base
    keep: Keep
    w: Stored
    p: Tensors
    bias: Tensor | None  # in forward
    seed: Tensor | None
    need: Need
    source: Source | None  # of x, in forward

    def linear(self, x: Tensor, low_rank=None, add: Tensor | None = None, entries: SparseMatrix = ()) -> Tensor:
        """Returns enter(x)·Wᵀ + bias with the optional terms of `Base.linear`; x·Sᵀ does not pass through `enter`."""
        base = self.base
        if not entries:
            return base.linear(self.w, base.enter(self.w, x), low_rank, self.bias, add)
        if type(base).enter is Base.enter:
            return base.linear(self.w, x, low_rank, self.bias, add, entries)
        y = base.linear(self.w, base.enter(self.w, x), low_rank, self.bias, add)
        return plus_entries(y, x, entries)

    def linear_t(self, dy: Tensor, low_rank=None, add: Tensor | None = None, entries: SparseMatrix = ()) -> Tensor:
        """Returns leave(dy·W) with the optional terms of `Base.linear_t`, which do not pass through `leave`."""
        base = self.base
        if type(base).leave is Base.leave:
            if not entries:
                return base.linear_t(self.w, dy, low_rank, add)
            return base.linear_t(self.w, dy, low_rank, add, entries)
        dx = base.leave(self.w, base.linear_t(self.w, dy))
        if low_rank is not None:
            dx = dx.addmm_(*low_rank)
        return plus_entries_t(dx if add is None else dx.add_(add), dy, entries)

    def save(self, z: Tensor, source: Source | None) -> Kept:
        return self.keep.save(z, source, self.seed)

    def operands(self, g: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        return self.keep.operands(g, kept)

    def weight_grad(self, g: Tensor, kept: Kept) -> Tensor:
        return self.keep.weight_grad(g, kept)

    def no_dw(self) -> Gradients:
        """The gradients of the stored tensors where none of them trains."""
        return (None,) * len(self.w.tensors)


class Delta(Axis):
    """What is trained, and the order in which the layer's work is done."""

    names: ClassVar[tuple[str, ...]] = ()  # of the tensors in p
    learns: ClassVar[tuple[str, ...] | None] = None  # of p, those that train (may be a property); None: all
    trains: ClassVar[bool] = True
    random: ClassVar[bool] = False  # draws in training mode (may be a property)
    resizes: ClassVar[tuple[str, ...]] = ()  # of p, those whose length a run decides
    wide: ClassVar[tuple[str, ...]] = ()  # of p, those that have at least 32 bits, whatever dtype the layer is moved to

    def __init_subclass__(cls, **settings: Any) -> None:
        # A kind that computes one layer in its own way does not inherit how another kind computes several.
        super().__init_subclass__(**settings)
        if not vars(cls).keys().isdisjoint(("forward", "backward")):
            for name in ("forward_all", "backward_all"):
                if name not in vars(cls):
                    setattr(cls, name, getattr(Delta, name))

    def init(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensors:
        """Returns fresh p for a layer of (N, K), where W need not be read for it."""
        return ()

    def begin(self, weight: Tensor) -> tuple[Tensor, Tensors]:
        """Returns what is to be stored in the place of the dense weight (N, K), and fresh p. It is called before a base
        stores, for a delta whose start depends on W, and does not write to `weight`."""
        return weight, self.init((weight.shape[0], weight.shape[1]), weight.dtype, weight.device)

    def stored_learns(self, base: Base) -> tuple[str, ...]:
        """The names of the stored tensors that train."""
        return ()

    def needs_keep(self) -> bool:
        """Whether some gradient of this delta needs what `keep` saves."""
        return True

    def eval(self) -> Delta:
        """The same delta as it acts in evaluation mode."""
        return self

    def why_not(self, base: Base, keep: Keep, shape: tuple[int, int]) -> str | None:
        """Why this delta cannot work over base and keep on a layer of (N, K): a sentence with the remedy, or None."""
        return None

    def refuse(self, p: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Raises ValueError where the tensors in `p`, by their names in the delta, cannot be those of a layer of
        (N, K): asked before values from outside, of a file, a checkpoint or a user, are copied over its own."""

    def forward(self, c: Call, x: Tensor) -> tuple[Tensor, Kept]:
        """Returns y (M, N) and what is saved for backward: only what the gradients in `c.need` take."""
        raise NotImplementedError

    def backward(
        self, c: Call, dy: Tensor, saved: Kept, add: Tensor | None = None
    ) -> tuple[Tensor | None, Gradients, Gradients]:
        """Returns dx (+ add (M, K), which it consumes) or None, the gradients of the stored tensors, and those of p,
        None where not needed. The bias is the Function's business. `add` is given only where `c.need.x`."""
        raise NotImplementedError

    def forward_all(self, calls: list[Call], x: Tensor) -> tuple[list[Tensor], list[Kept]]:
        """Does `forward` for several layers that have this delta, one keep and one x. Returns what each of them gives,
        and any number of tuples to be saved. A kind overrides it, and `backward_all`, where it can compute together
        what `forward` computes for one layer."""
        ys, saved = zip(*[self.forward(c, x) for c in calls], strict=True)
        return list(ys), list(saved)

    def backward_all(
        self, calls: list[Call], dys: list[Tensor | None], saved: list[Kept], add: Tensor | None = None
    ) -> tuple[Tensor | None, list[tuple[Gradients, Gradients]]]:
        """Returns the sum of all dx (+ add, which it consumes) or None, and each layer's gradients of the stored
        tensors and of p. A dy is None where nobody used what the layer gave; its gradients are None."""
        dx, grads = add, []
        for c, dy, kept in zip(calls, dys, saved, strict=True):
            if dy is None:
                grads.append((c.no_dw(), (None,) * len(c.p)))
            else:
                dx, dws, dps = self.backward(c, dy, kept, dx)
                grads.append((dws, dps))
        return dx, grads

    def weight(self, c: Call, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """Returns rows a..b of the W that a plain layer would have, in dtype: the stored ones if the delta adds
        nothing."""
        return c.base.rows(c.w, a, b, dtype)

    def put(self, c: Call) -> None:
        """Writes into the stored weight what p says, by `c.base.put`. Called without grad mode, before W is read: W has
        then any delta that was put there before, or none, and p may have changed in ways that leave no trace.
        """

    def take_back(self, c: Call) -> None:
        """Undoes `put`, bit for bit, whatever the tensors that train have become since."""

    @property
    def in_place(self) -> bool:
        """Whether the stored weight holds the delta, so that products with it need nothing more."""
        return type(self).put is not Delta.put

    @property
    def adds(self) -> bool:
        """Whether that W is another than the one that was stored."""
        return self.in_place or type(self).weight is not Delta.weight


def check(base: Base, delta: Delta, keep: Keep, shape: tuple[int, int]) -> str | None:
    """None, or why the three cannot be combined on a layer of (N, K), as a sentence with the remedy."""
    if not keep.keeps and delta.needs_keep():
        return f"{delta} needs the layer's input in backward and keep={keep} drops it; use keep=Exact()"
    if delta.in_place and not base.puts:
        return (
            f"{delta} writes entries of the stored weight, and those of {base} cannot be any number; leave the weight "
            "dense, or add an adapter such as lora(r=16)"
        )
    return delta.why_not(base, keep, shape)
