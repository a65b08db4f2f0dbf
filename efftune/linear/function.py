"""The one autograd Function: packs tensors, calls the delta, unpacks. It knows no kind of base, delta or keep."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from efftune.errors import refuse_second_derivative
from efftune.linear.contracts import Base, Delta, Keep, Need
from efftune.linear.handle import flatten, reshaped, unflatten
from efftune.ops._op import forced_backend, use_backend


class LinearFunction(torch.autograd.Function):
    # Tensors come flat: one inside a tuple argument would lose its gradient.
    @staticmethod
    def forward(ctx, axes: tuple[Base, Delta, Keep], need: Need, num_w: int, source, seed, x, bias, *tensors):
        base, delta, keep = axes
        w, p = tensors[:num_w], tensors[num_w:]
        y, saved = delta.forward(base, keep, as_matrix(x), bias, w, p, seed, need, source)
        saved, ctx.structure = flatten(saved)
        ctx.source = None if source is None else weakref.ref(source)
        ctx.save_for_backward(seed, *tensors, *saved)
        ctx.backend = None if torch.compiler.is_compiling() else forced_backend()
        ctx.axes, ctx.need, ctx.num_w, ctx.num_tensors, ctx.shape = axes, need, num_w, len(tensors), x.shape
        return y if x.dim() == 2 else reshaped(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("efftune.Linear")
        base, delta, keep = ctx.axes
        source = None if ctx.source is None else ctx.source()
        if source is not None:
            source.kept.clear()  # what reads the same tensor in another forward pass draws anew
        seed, *rest = ctx.saved_tensors
        w, p, saved = rest[: ctx.num_w], rest[ctx.num_w : ctx.num_tensors], tuple(rest[ctx.num_tensors :])
        saved = unflatten(saved, ctx.structure)
        # One copy of an expanded dy here instead of one in each of the products below.
        dy = as_matrix(dy).contiguous()
        arguments = base, keep, dy, tuple(w), tuple(p), saved, seed, ctx.need
        if ctx.backend is None:
            dx, dws, dps = delta.backward(*arguments)
        else:
            with use_backend(ctx.backend):
                dx, dws, dps = delta.backward(*arguments)
        if dx is not None and len(ctx.shape) != 2:
            dx = dx.view(ctx.shape)
        return None, None, None, None, None, dx, dy.sum(0) if ctx.need.bias else None, *dws, *dps


def as_matrix(x: Tensor) -> Tensor:
    """(..., K) -> (M, K), a view where strides allow."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
