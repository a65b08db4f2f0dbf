"""The one autograd Function: packs tensors, calls the delta, unpacks. It knows no kind of base, delta or keep."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from efftune.errors import refuse_second_derivative, refuse_tracing
from efftune.linear.contracts import Base, Call, Delta, Keep, Need, Stored
from efftune.linear.handle import flatten, reshaped, unflatten
from efftune.ops._op import use_backend

new = tuple.__new__  # of a NamedTuple: half the time of calling its class, 0.3 µs, which a small layer notices


def only(x: Tensor | None, named: dict[str, Tensor]) -> Tensor:
    """The one argument of a forward, which callers of the module that stood there before may give by its name there."""
    given = [*named.values()] if x is None else [x, *named.values()]
    if len(given) != 1:
        raise TypeError(f"forward takes one tensor and was given {len(given)}.")
    return given[0]


class LinearFunction(torch.autograd.Function):
    # Tensors come flat: one inside a tuple argument would lose its gradient.
    @staticmethod
    def forward(ctx, axes: tuple[Base, Delta, Keep], what: tuple, backend, need: Need, source, seed, x, bias, *tensors):
        base, delta, keep = axes
        num_w, shape = len(need.w), x.shape
        matrix = len(shape) == 2
        rows = x if matrix else x.reshape(-1, shape[-1])
        w = new(Stored, (tensors[:num_w], *what))
        y, saved = delta.forward(new(Call, (base, keep, w, tensors[num_w:], bias, seed, need, source)), rows)
        saved, structure = flatten(saved)
        source = None if source is None else weakref.ref(source)
        ctx.save_for_backward(seed, *tensors, *saved)
        # One attribute: each costs as much as the others together.
        ctx.call = axes, what, need, len(tensors), structure, source, backend, None if matrix else shape
        # Compiled by torch 2.11, an output that was written to in place has no gradient, and its view has.
        return y if matrix and not is_compiling() else reshaped(y, (*shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            refuse_second_derivative("efftune.Linear")
        (base, delta, keep), what, need, num_tensors, structure, source, backend, shape = ctx.call
        source = None if source is None else source()
        if source is not None:
            source.kept.clear()  # what reads the same tensor in another forward pass draws anew
        tensors = ctx.saved_tensors
        after_w, after_p = 1 + len(need.w), 1 + num_tensors  # behind the seed
        w, saved = new(Stored, (tensors[1:after_w], *what)), unflatten(tensors[after_p:], structure)
        c = new(Call, (base, keep, w, tensors[after_w:after_p], None, tensors[0], need, None))
        # One copy of an expanded dy here instead of one in each of the products below.
        dy = (dy if shape is None else dy.reshape(-1, dy.shape[-1])).contiguous()
        if backend is None:
            dx, dws, dps = delta.backward(c, dy, saved)
        else:
            with use_backend(backend):
                dx, dws, dps = delta.backward(c, dy, saved)
        if dx is not None and shape is not None:
            dx = dx.view(*shape)  # not of `shape`: see `reshaped`
        return None, None, None, None, None, None, dx, dy.sum(0) if need.bias else None, *dws, *dps


def applied(function: type[torch.autograd.Function]) -> Callable:
    """function.apply without torch's Python around it, which looks for transforms of functorch and takes a third of the
    call, 3 µs."""
    below = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args):
        if is_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        if torch._C._is_tracing():
            refuse_tracing()
        return below(*args)

    return apply


apply_linear = applied(LinearFunction)


def as_matrix(x: Tensor) -> Tensor:
    """Returns x (..., K) as a matrix (M, K), a view where strides allow."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
