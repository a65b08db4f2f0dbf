"""Handles: tensors that backward makes again instead of keeping them.

A norm's output, act(gate)·up, a dequantised activation: each follows element-wise from tensors that backward has
anyway. The operation that makes such a tensor attaches a `Source` to it; a Linear that reads the tensor finds the
source, and puts the handle's tensors, not the input itself, into its own saved tensors. A source that gets lost (by an
operation in between, or under torch.compile, where the compiler decides what to recompute) costs memory and nothing
else.

All tensors of a handle go through save_for_backward: every meter and every saved-tensor hook sees them, autograd frees
them, and a change in place is noticed. Between forward and backward a handle holds nothing outside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

_ATTRIBUTE = "_efftune_source"


class _Shared:
    """One rebuilt tensor for all who load it in one backward: the first makes it, the last lets it go."""

    __slots__ = ("left", "users", "value")

    def __init__(self) -> None:
        self.users = self.left = 0
        self.value: Tensor | None = None

    def get(self, make: Callable[[], Tensor]) -> Tensor:
        if self.value is None:
            self.value, self.left = make(), self.users
        value = self.value
        self.skip()
        return value

    def drop(self) -> None:
        """For the operation that made the tensor: its backward comes after those of all users, of which some may not
        have had one."""
        self.value = None

    def skip(self) -> None:
        """For a user who makes do without the whole tensor."""
        if self.value is None:
            self.users -= 1
            return
        self.left -= 1
        if self.left == 0:
            self.value = None


@dataclass(eq=False, slots=True)
class Handle:
    """How to make a tensor (M, K) again: make(*rows, *shared).

    Args:
        rows: tensors (M, ...), or handles of such.   shared: tensors that do not belong to rows (weights, seeds).
        rowwise: row i of the result depends on row i of `rows` only, so that a few rows can be made alone.
        held: whether backward holds the tensors of `rows` for somebody else in any case, so that keeping the handle
            costs nothing.
        elementwise: entry (i, k) depends on the entries (i, k) of `rows` only, so that a few columns can be made alone.
    """

    make: Callable[..., Tensor]
    rows: tuple[Tensor | Handle, ...]
    shared: tuple[Tensor, ...] = ()
    rowwise: bool = True
    held: bool = True
    elementwise: bool = False
    once: _Shared = field(default_factory=_Shared)
    flat: tuple[list[Tensor], tuple] | None = None  # of `_strip`: all layers that read one tensor save the same handle

    def keep(self) -> Handle:
        """Counts a user: whoever saves the handle calls it once."""
        if self.once.users == 0:
            for part in self.rows:
                if isinstance(part, Handle):
                    part.keep()
        self.once.users += 1
        return self

    def columns(self, index: Tensor) -> Handle:
        """How to make some of the tensor's columns (M, S): from columns, where that is all it takes."""
        if not self.elementwise:
            return Handle(_columns, (self,), (index,), self.rowwise, self.held)
        parts = [p.columns(index) if isinstance(p, Handle) else Handle(_columns, (p,), (index,)) for p in self.rows]
        return Handle(self.make, tuple(parts), self.shared, self.rowwise, self.held, elementwise=True)

    def load(self, index: Tensor | None = None) -> Tensor:
        """The tensor, or its rows `index`."""
        if index is not None and self.rowwise:
            self.once.skip()
            return self._make(index)
        if index is not None:
            return self.load().index_select(0, index)
        return self._make(None) if self.once.users < 2 else self.once.get(lambda: self._make(None))

    def _make(self, index: Tensor | None) -> Tensor:
        return self.make(*[load(part, index) for part in self.rows], *self.shared)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(1, index)


def load(part: Tensor | Handle, index: Tensor | None = None) -> Tensor:
    """Returns a tensor that was saved as it is, or as a handle; or its rows `index`."""
    if isinstance(part, Handle):
        return part.load(index)
    return part if index is None else part.index_select(0, index)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Source:
    """What is known about a tensor that linear layers read."""

    handle: Handle | None = None
    version: int = 0  # of the tensor, when this was known of it
    width: int = 0  # columns of it as a matrix
    scores: Tensor | None = None  # (M,) float32: how large each row's gradient is expected to be
    kept: dict = field(default_factory=dict)  # keep -> what it took, one sample for all layers that read the tensor
    casts: dict = field(default_factory=dict)  # dtype -> the Source of the tensor cast to it

    def cast(self, dtype: torch.dtype) -> Source:
        if dtype not in self.casts:
            handle = self.handle
            if handle is not None:
                handle = Handle(lambda x: x.to(dtype), (handle,), rowwise=handle.rowwise, held=handle.held)
            self.casts[dtype] = Source(handle)
        return self.casts[dtype]


def attach(x: Tensor, handle: Handle, width: int) -> Tensor:
    """Returns x, which `handle` can make again, as a matrix of `width` columns in the order of x's memory."""
    source = Source(handle, x._version, width)
    setattr(x, _ATTRIBUTE, source)
    return x


def source_of(x: Tensor, create: bool = False) -> Source | None:
    """Returns the source of x, or of the tensor that x is a reshaped view of; None where there is none."""
    source = getattr(x, _ATTRIBUTE, None)
    if source is None:
        base = x._base
        if base is None and not create:
            return None
        if x.is_inference():
            return None  # it has no version, so that a change in place would go unnoticed
        if base is not None and x.is_contiguous() and x.numel() == base.numel():
            # A view of the whole storage in the order of memory: attention's (B, H, T, D), read as (B, T, H·D).
            if x.untyped_storage().nbytes() == x.numel() * x.element_size():
                source = getattr(base, _ATTRIBUTE, None)
    if source is not None and (source.version != x._version or source.width != x.shape[-1]):
        source = None  # x has been changed in place since, or is read in rows of another width
    if source is None and create:
        source = Source(version=x._version, width=x.shape[-1])
        setattr(x, _ATTRIBUTE, source)
    return source


def reshaped(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a fresh y in another shape, not as a view: autograd forbids changes in place of a view that a Function
    returns."""
    if is_compiling() or not y.is_contiguous():
        return torch.ops.aten._unsafe_view(y, shape)
    # Of as many elements: nothing moves, and it takes a tenth of the time. (A shape as one argument takes torch's
    # parser three times as long as its numbers.)
    return y.resize_(*shape)


# Autograd saves a flat list of tensors. A structure is what remains of nested handles without them.


def flatten(saved: tuple) -> tuple[Sequence[Tensor], tuple | None]:
    """Splits a tuple of tensors and handles into its tensors and what `unflatten` needs, None for tensors alone."""
    if Handle not in map(type, saved):
        return saved, None
    tensors: list[Tensor] = []
    structure = tuple([_strip(part, tensors) for part in saved])
    return tensors, structure


def _strip(part: Tensor | Handle, tensors: list[Tensor]) -> Any:
    if not isinstance(part, Handle):
        tensors.append(part)
        return None
    if part.flat is None:
        inner: list[Tensor] = []
        rows = tuple([_strip(row, inner) for row in part.rows])
        inner.extend(part.shared)
        part.flat = inner, (part.make, rows, len(part.shared), part.rowwise, part.held, part.once)
    tensors.extend(part.flat[0])
    return part.flat[1]


def unflatten(tensors: tuple[Tensor, ...], structure: tuple | None) -> tuple:
    if structure is None:
        return tensors
    remaining = iter(tensors)
    return tuple([next(remaining) if part is None else _restore(part, remaining) for part in structure])


def _restore(part: tuple, tensors: Iterator[Tensor]) -> Handle:
    make, rows, num_shared, rowwise, held, once = part
    made = tuple([next(tensors) if row is None else _restore(row, tensors) for row in rows])
    return Handle(make, made, tuple([next(tensors) for _ in range(num_shared)]), rowwise, held, once)
