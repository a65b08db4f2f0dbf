"""Rotary position embedding whose backward has cos and sin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from efftune.errors import refuse_second_derivative
from efftune.linear.function import applied
from efftune.ops.rotary import composition
from efftune.ops.rotary import rotary as rotate
from efftune.ops.rotary import rotary_pair as rotate_pair


class _Rotary(torch.autograd.Function):
    """Of one tensor, or of q and k with one cos and sin: a Function costs as much on the host as what it calls."""

    @staticmethod
    def forward(ctx, cos, sin, *xs):
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        return rotate(xs[0], cos, sin) if len(xs) == 1 else rotate_pair(xs[0], xs[1], cos, sin)

    @staticmethod
    def backward(ctx, *dys):
        refuse_second_derivative("rotary")
        cos, sin = ctx.saved_tensors
        if len(dys) == 2 and dys[0] is not None and dys[1] is not None:
            return None, None, *rotate_pair(dys[0], dys[1], cos, sin, transposed=True)
        return None, None, *[None if dy is None else rotate(dy, cos, sin, transposed=True) for dy in dys]


_apply = applied(_Rotary)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x∘cos + rotate_half(x)∘sin, rotate_half(x) = (-x2, x1) of the halves x1, x2 of the columns.

    Args:
        x: (B, H, T, D) f32 | bf16 | f16, D even; best a view of (B, T, H, D), as projections give it.
        cos, sin: (B, T, D) or (1, T, D), both in x's dtype or both in f32. They get no gradient.
    Returns: (B, H, T, D), dtype of x, with its dimensions in the same order in memory.
    Numerics: float32 inside, rounded once, forward and backward (transformers rounds three times).
    Saved for backward: cos and sin themselves, nothing of x: one pair of tensors for all layers that are given it.
    Under torch.compile: the formula in torch's operations, which the compiler fuses.
    Raises: ValueError for other shapes and dtypes.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    if is_compiling():
        return composition(x, cos.unsqueeze(1), sin.unsqueeze(1)).to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rotate(x, cos, sin)
    return _apply(cos, sin, x)


def rotary_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `rotary` of q and of k in one autograd Function, outside torch.compile."""
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        return rotate_pair(q, k, cos, sin)
    return _apply(cos, sin, q, k)


# Whoever calls `rotary` in the place of another function knows by the mark that cos is meant for it.
MARK = "_efftune_rotary"


def set_marked(cos: Any) -> None:
    """Marks cos, if it is a tensor."""
    if isinstance(cos, Tensor):
        setattr(cos, MARK, True)


def is_marked(cos: Any) -> bool:
    """Whether cos is a tensor with the mark."""
    return isinstance(cos, Tensor) and hasattr(cos, MARK)
