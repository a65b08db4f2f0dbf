"""Trained: the stored weight itself trains, or what of it can learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from efftune.linear.contracts import Delta, product_t

TILE = 2**22  # entries of dW at once


@dataclass(frozen=True)
class Trained(Delta):
    """y = enter(x)·Wᵀ + bias, and whatever the base lets learn trains: W itself over `Dense` (full fine-tuning), the
    scales of integer weights over `Int8` (PEQA): ds = Σ over the group of dW · code.

    dW = dyᵀ·z̃, with z̃ = enter(x) as `keep` returns it.

    Numerics: dW accumulates in f32 and is rounded to x.dtype; then see `base.weight_vjp`. Where dW is no gradient
        itself, it is made and summed up a tile of rows at a time; of a sampled keep the weighted rows of dy are then
        rounded to x.dtype as well.
    Saved for backward: keep(z), and only if a gradient of the stored tensors is asked for.
    Source: Kim et al. 2023, arXiv:2305.14152 (PEQA).
    """

    def stored_learns(self, base):
        return base.learns

    def why_not(self, base, keep, shape):
        if not base.learns:
            return f"nothing that {base} stores can train; add an adapter such as lora(r=16)"
        return None

    def forward(self, c, x):
        if not any(c.need.w):
            return c.linear(x), ()
        z = c.base.enter(c.w, x)
        return c.base.linear(c.w, z, bias=c.bias), c.save(z, c.source if z is x else None)

    def backward(self, c, dy, saved, add=None):
        dx = c.linear_t(dy, add=add) if c.need.x else None
        if not any(c.need.w):
            return dx, c.no_dw(), ()
        n, k = c.w.shape
        step = n if c.base.trains else max(1, TILE // k)
        if step >= n:
            return dx, c.base.weight_vjp(c.w, c.weight_grad(dy, saved), 0, n), ()
        g, z = c.operands(dy, saved)
        tiles = [
            c.base.weight_vjp(c.w, product_t(g[:, a : a + step], z), a, min(a + step, n)) for a in range(0, n, step)
        ]
        dws = [_joined(parts, w) for parts, w in zip(zip(*tiles, strict=True), c.w.tensors, strict=True)]
        return dx, tuple(dws), ()


def _joined(parts, like: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a stored tensor from those of tiles of rows, or from what each tile adds to the whole of it."""
    if parts[0] is None:
        return None
    return torch.cat(parts) if parts[0].shape != like.shape else torch.stack(parts).sum(0)
