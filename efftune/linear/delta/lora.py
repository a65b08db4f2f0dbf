"""LoRA: a trained low-rank matrix added to a frozen weight of any storage."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.linear.contracts import Delta, Tensors
from efftune.linear.handle import Handle, Source
from efftune.ops.dropout import dropout

DROPOUT_STREAM = 1  # keep draws from stream 0 of the same seed: one stream for both gives biased gradients


@dataclass(frozen=True)
class LoRA(Delta):
    """y = x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ, with W frozen; one product with a rank-R epilogue, forward and backward.

    Args (as in PEFT):
        r: rank, 1 ≤ r ≤ min(N, K).   lora_alpha: scale = lora_alpha / r (None: lora_alpha = r), dimensionless.
        use_rslora: scale = lora_alpha / √r instead.   lora_dropout: probability in [0, 1) on the adapter's input.
        freeze_a: A stays at its random start and only B trains; then x is not kept.
        dtype: of A and B, "float32" by default whatever the model's: an update of a bfloat16 adapter is lost when it is
            below 1/256 of the entry. None: the weight's dtype.
    Shapes: x (M, K), A `lora_a` (r, K), B `lora_b` (N, r). A starts uniform in ±1/√K (Kaiming, a = √5), B at zero.
    Gradients: x, A, B (and the bias, if it trains); never W.
    Numerics: A and B are rounded to x.dtype; products accumulate in f32; scale · x Aᵀ is rounded to x.dtype once,
        and so are the gradients of A and B.
    Saved for backward: keep(x), with dropout the seed besides (the mask is drawn again), unless A is frozen; and
        scale · x Aᵀ (M·r elements).
    Raises: EfftuneError (a ValueError) on a rank, dropout or dtype out of range.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; frozen A: Zhu et al.
        2024, arXiv:2402.16842.
    """

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    freeze_a: bool = False
    dtype: str | None = "float32"

    names = ("lora_a", "lora_b")

    def __post_init__(self):
        if self.r < 1:
            raise EfftuneError(f"lora needs a rank of at least 1, not r={self.r}; 16 is usual.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise EfftuneError(f"lora_dropout is a probability in [0, 1), not {self.lora_dropout}.")
        dtype = torch.float32 if self.dtype is None else getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise EfftuneError(f"lora's dtype is 'float32', 'bfloat16', 'float16' or None, not {self.dtype!r}.")

    @property
    def scale(self) -> float:
        alpha = self.r if self.lora_alpha is None else self.lora_alpha
        return alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def random(self) -> bool:
        return self.lora_dropout > 0

    @property
    def learns(self) -> tuple[str, ...]:
        return ("lora_b",) if self.freeze_a else self.names

    def init(self, shape, dtype, device):
        n, k = shape
        dtype = dtype if self.dtype is None else getattr(torch, self.dtype)
        a = torch.empty(self.r, k, device="meta" if device.type == "meta" else "cpu", dtype=dtype)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # on the CPU: a seed means the same numbers on every device
        a = a.to(device)
        return a, a.new_zeros(n, self.r)

    def needs_keep(self):
        return not self.freeze_a

    def eval(self):
        return replace(self, lora_dropout=0.0)

    def why_not(self, base, keep, shape):
        if self.r > min(shape):
            return (
                f"r={self.r} exceeds min(N, K) = {min(shape)} of a layer of {shape}; choose a smaller r or other layers"
            )
        return None

    def forward(self, c, x):
        a, b = c.p
        if a.dtype != x.dtype or b.dtype != x.dtype:
            a, b = a.to(x.dtype), b.to(x.dtype)
        z, source = x, c.source
        if self.lora_dropout:
            assert c.seed is not None  # what draws gets one
            z = dropout(x, self.lora_dropout, c.seed, DROPOUT_STREAM)
            if source is not None:
                source = _dropped(x, source, self.lora_dropout, c.seed)
        scale = self.scale  # F.linear transposes a without a tensor in Python for it
        h = F.linear(z, a) if scale == 1.0 else _scaled_product(z, a.t(), scale)  # (M, R)
        y = c.linear(x, (h, b))
        kept = c.save(z, source) if c.need.p[0] else ()
        return y, (h, *kept) if c.need.p[1] else kept

    def backward(self, c, dy, saved: Tensors, add=None):
        a, b = c.p
        if a.dtype != dy.dtype or b.dtype != dy.dtype:
            a, b = a.to(dy.dtype), b.to(dy.dtype)
        need_a, need_b = c.need.p
        dx = da = db = None
        kept = saved[1:] if need_b else saved
        if need_b:
            db = torch.mm(dy.t(), saved[0])  # (N, R); laid out as lora_b is, so that autograd need not copy it
        if need_a or c.need.x:
            dh = _scaled_product(dy, b, self.scale)  # (M, R)
            if need_a:
                da = c.weight_grad(dh, kept)
            if c.need.x and self.lora_dropout:
                assert c.seed is not None
                thin = dropout(dh @ a, self.lora_dropout, c.seed, DROPOUT_STREAM)
                dx = c.linear_t(dy, add=thin if add is None else add.add_(thin))
            elif c.need.x:
                dx = c.linear_t(dy, (dh, a), add)
        return dx, c.no_dw(), (da, db)

    def forward_all(self, calls, x):
        if self.lora_dropout:  # each layer drops other entries of x
            return super().forward_all(calls, x)
        a = _stacked([c.p[0] for c in calls], x.dtype)  # (L·R, K) of L layers
        h = _scaled_product(x, a.t(), self.scale)  # (M, L·R): x is read once
        ys = [c.linear(x, (part, _in(c.p[1], x.dtype))) for c, part in zip(calls, self._columns(h), strict=True)]
        kept = calls[0].save(x, calls[0].source) if any([c.need.p[0] for c in calls]) else ()
        return ys, [(h, *kept) if any([c.need.p[1] for c in calls]) else kept]

    def backward_all(self, calls, dys: list[Any], saved, add=None):
        if self.lora_dropout:
            return super().backward_all(calls, dys, saved, add)
        das: list[Any] = [None] * len(calls)
        dbs: list[Any] = [None] * len(calls)
        dx, kept = add, cast(Any, saved[0])
        if any([c.need.p[1] for c in calls]):
            for i, h in enumerate(self._columns(kept[0])):
                if dys[i] is not None and calls[i].need.p[1]:
                    dbs[i] = _few_columns(dys[i], h)
            kept = kept[1:]
        needs_a = [i for i, c in enumerate(calls) if dys[i] is not None and c.need.p[0]]
        reached = [i for i, dy in enumerate(dys) if dy is not None] if calls[0].need.x else needs_a
        if reached:
            dy = dys[reached[0]]
            dh = dy.new_empty(dy.shape[0], len(reached) * self.r)  # (M, L·R)
            parts = dict(zip(reached, self._columns(dh), strict=True))
            for i, part in parts.items():
                part.addmm_(dys[i], _in(calls[i].p[1], dy.dtype), beta=0, alpha=self.scale)
            if needs_a:
                together = dh if needs_a == reached else torch.cat([parts[i] for i in needs_a], 1)
                da = calls[0].weight_grad(together, kept)  # (L·R, K)
                for i, part in zip(needs_a, da.view(-1, self.r, da.shape[1]).unbind(), strict=True):
                    das[i] = part
            if calls[0].need.x:
                a = _stacked([calls[i].p[0] for i in reached], dy.dtype)
                dx = torch.mm(dh, a) if add is None else add.addmm_(dh, a)
                for i in reached:
                    dx = calls[i].linear_t(dys[i], add=dx)
        return dx, [(c.no_dw(), dps) for c, dps in zip(calls, zip(das, dbs, strict=True), strict=True)]

    def _columns(self, h: Tensor) -> Tensors:
        """The parts (M, R) of (M, L·R)."""
        return h.view(h.shape[0], h.shape[1] // self.r, self.r).unbind(1)

    def weight(self, c, a, b, dtype):
        lora_a, lora_b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in c.p)
        added = self.scale * (lora_b[a:b] @ lora_a)
        return (c.base.rows(c.w, a, b, torch.promote_types(dtype, added.dtype)) + added).to(dtype)


def _dropped(x: Tensor, source: Source, p: float, seed: Tensor) -> Source:
    """drop(x) is x, which layers that read it share, and a seed of its own."""

    def again(x: Tensor, seed: Tensor) -> Tensor:
        return dropout(x, p, seed, DROPOUT_STREAM)

    known = source.handle
    return Source(Handle(again, (known or x.detach(),), (seed,), rowwise=False, held=known is not None and known.held))


def _in(t: Tensor, dtype: torch.dtype) -> Tensor:
    # A no-op `.to` costs 0.7 µs, a seventh of what the rest of a small forward takes in Python.
    return t if t.dtype == dtype else t.to(dtype)


def _few_columns(dy: Tensor, h: Tensor) -> Tensor:
    """dyᵀ·h (N, R)."""
    if dy.is_cpu and dy.dtype == torch.float32 and dy.numel() > 2**16:
        # MKL takes 0.6 of the time if the result has few rows instead, and the copy is small.
        return torch.mm(h.t(), dy).t().contiguous()
    return torch.mm(dy.t(), h)


def _stacked(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The rows of all parts, of one shape, in dtype."""
    if parts[0].dtype == dtype:
        return torch.cat(parts)
    rows, columns = parts[0].shape
    return torch.cat(parts, out=parts[0].new_empty(len(parts) * rows, columns, dtype=dtype))  # cast in the same pass


def _scaled_product(x: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · x·b with the scale applied to the accumulator: no further rounding and no pass over the result."""
    if scale == 1.0:
        return torch.mm(x, b)
    return x.new_empty(x.shape[0], b.shape[1]).addmm_(x, b, beta=0, alpha=scale)
