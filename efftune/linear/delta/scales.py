"""Scales: of a quantised weight, what is floating point trains, and the integers stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from efftune.linear.contracts import Delta

TILE = 2**22  # entries of dW at once


@dataclass(frozen=True)
class Scales(Delta):
    """y = x·W(codes, s)ᵀ + bias with s trained: ds = Σ over the group of dW · code, dW = dyᵀ·x̃ with x̃ as `keep`
    returns it.

    Numerics: dW accumulates in f32 and is rounded to x.dtype; then see `base.weight_vjp`.
    Saved for backward: keep(x), if the gradient of s is asked for. dW is made and summed up a tile of rows at a time.
    Source: Kim et al. 2023, arXiv:2305.14152 (PEQA).
    """

    def trainable(self, base, w):
        return tuple([t.is_floating_point() for t in w]), ()

    def why_not(self, base, keep, shape):
        if base.trains:
            return f"the scales of integer weights train, and {base} has none; put int8 in front"
        return None

    def forward(self, base, keep, x, bias, w, p, seed, need, source):
        return base.linear(w, x, bias=bias), keep.save(x, source, seed) if any(need.w) else ()

    def backward(self, base, keep, dy, w, p, saved, seed, need):
        dx = base.linear_t(w, dy) if need.x else None
        if not any(need.w):
            return dx, (None,) * len(w), ()
        n, k = base.shape(w)
        step = max(1, TILE // k)
        tiles = [
            base.weight_vjp(w, keep.weight_grad(dy[:, a : a + step], saved), a, min(a + step, n))
            for a in range(0, n, step)
        ]
        return dx, tuple([torch.cat(parts) if parts[0] is not None else None for parts in zip(*tiles, strict=True)]), ()
