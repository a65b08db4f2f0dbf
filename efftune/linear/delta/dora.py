"""DoRA: the direction of each row of W moves by a low-rank matrix, and its length trains by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efftune.linear.delta.lora import DROPOUT_STREAM, LoRA, _dropped
from efftune.ops.dropout import dropout

TILE = 2**22  # entries of W at once


@dataclass(frozen=True)
class DoRA(LoRA):
    """y = g ∘ (x·(W + s·B·A)ᵀ) + bias with g = m / ‖W + s·B·A‖ by row, as in PEFT; W is frozen, A, B and m train.

    Under dropout, z = drop(x): y = g ∘ (z·(W + s·B·A)ᵀ) + (x - z)·Wᵀ + bias, as in PEFT: what is dropped still goes
    through the plain layer, at the price of a second product with W, forward and backward.
    The norm is held constant in backward (sec. 4.3 of the paper), and W + s·B·A is never made:
    ‖W_n + s·(BA)_n‖² = ‖W_n‖² + 2s·(W·Aᵀ)_n·B_n + s²·B_n·(A·Aᵀ)·B_n, from W as it is stored, in tiles of rows, once a
    forward pass. dm_n = Σ dy·(y - bias) / m_n is read off the output.

    Args: those of `LoRA`, with the same meaning and s = `scale`.
    Shapes: A `lora_a` (r, K), B `lora_b` (N, r), m `lora_magnitude_vector` (N,). m starts as the rows' norms, so that
        the layer starts as the plain one; over a base that rounds, those of W before it was rounded.
    Gradients: x, A, B, m (and the bias, if it trains); never W.
    Numerics: as `LoRA` with dy·g, which is rounded to x.dtype, in the place of dy. The norm and g are in f32. The
        product is rounded to x.dtype before g scales it. dm sees y as it was rounded, the bias included, and products
        dy·y rounded to x.dtype; they are summed in f32. Under dropout dx is the sum of two rounded terms.
        The norm is that of W corrected by thin products: where s·B·A takes away all but a share q of a row, it loses
        the relative error 2⁻²⁴/q².
        A row whose W + s·B·A is zero gives y = bias there and zero gradients; where m is exactly 0 so is dm.
    Saved for backward: what `LoRA` saves, g, and the output y, which is the tensor that the next operation reads: where
        that one keeps it, it costs nothing, and a change of it in place is an error in backward. Under dropout it is
        g ∘ (z·(W + s·B·A)ᵀ) instead (M·N elements).
    Raises: EfftuneError (a ValueError) on a rank, dropout or dtype out of range.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5.
    """

    names = ("lora_a", "lora_b", "lora_magnitude_vector")

    @property
    def learns(self) -> tuple[str, ...]:
        return self.names[1:] if self.freeze_a else self.names

    def begin(self, weight):
        a, b = self.init((weight.shape[0], weight.shape[1]), weight.dtype, weight.device)
        dtype = _wide(weight.dtype, a.dtype)
        # As `gain` takes it, so that g is 1: a square's root is what was squared, to the bit.
        norms = [torch.linalg.vector_norm(weight[i:j].to(dtype), dim=1) for i, j in _tiles(weight.shape)]
        return weight, (a, b, torch.cat(norms).to(a.dtype))

    def gain(self, c) -> Tensor:
        """g (N,), in f32 or wider."""
        dtype = _wide(c.w.dtype, c.p[0].dtype)
        a, b, m = (t.to(dtype) for t in c.p)
        s, gram, squares = self.scale, a @ a.t(), []
        for i, j in _tiles(c.w.shape):
            w, rows = c.base.rows(c.w, i, j, dtype), b[i:j]
            cross = torch.addmm(w @ a.t(), rows, gram, beta=2 * s, alpha=s * s)
            squares.append(torch.linalg.vector_norm(w, dim=1).square() + (cross * rows).sum(1))
        return m / torch.cat(squares).clamp_min(torch.finfo(dtype).tiny).sqrt()

    def forward(self, c, x):
        plain, z, source = self, x, c.source
        if self.lora_dropout:
            assert c.seed is not None  # what draws gets one
            plain, z = self.eval(), dropout(x, self.lora_dropout, c.seed, DROPOUT_STREAM)
            source = None if source is None else _dropped(x, source, self.lora_dropout, c.seed)
        g = self.gain(c)
        inner = c._replace(p=c.p[:2], bias=None, need=c.need._replace(p=c.need.p[:2]), source=source)
        u, saved = LoRA.forward(plain, inner, z)
        none = g.new_empty(0)
        if self.lora_dropout:
            out, bias = u.mul_(g), none
            y = c.linear(x - z).add_(out)
        elif c.bias is None:
            y = out = u.mul_(g)
            bias = none
        else:
            y = out = torch.addcmul(c.bias, u, g, out=u)  # rounded once
            bias = c.bias
        if c.need.p[2]:
            saved = out, bias, *saved
        return y, (g, *saved)

    def backward(self, c, dy, saved, add=None):
        g, *rest = saved
        dm, dyg = None, dy.new_empty(dy.shape)
        if c.need.p[2]:
            y, bias, *rest = rest
            y = y.view(dy.shape)
            torch.mul(dy, torch.sub(y, bias, out=dyg) if bias.numel() else y, out=dyg)
            m = c.p[2]
            dm = dyg.sum(0, dtype=g.dtype) / torch.where(m == 0, 1.0, m)
        torch.mul(dy, g, out=dyg)
        inner = c._replace(p=c.p[:2], need=c.need._replace(p=c.need.p[:2]))
        plain = self.eval() if self.lora_dropout else self
        dx, dws, (da, db) = LoRA.backward(plain, inner, dyg, tuple(rest))
        if self.lora_dropout and c.need.x:
            assert c.seed is not None
            past = c.linear_t(dy)
            dx = past.add_(dropout(dx - past, self.lora_dropout, c.seed, DROPOUT_STREAM))
        return dx if add is None else add.add_(dx), dws, (da, db, dm)

    def weight(self, c, a, b, dtype):
        wide = _wide(dtype, c.p[0].dtype)
        rows = super().weight(c._replace(p=c.p[:2]), a, b, wide)
        norm = torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(wide).tiny)
        return (rows * (c.p[2][a:b].to(wide) / norm)[:, None]).to(dtype)


def _wide(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.promote_types(one, other), torch.float32)


def _tiles(shape) -> list[tuple[int, int]]:
    n, k = shape
    step = max(1, TILE // k)
    return [(a, min(a + step, n)) for a in range(0, n, step)]
