"""Attention whose weights exist, as Hugging Face models compute it with attn_implementation="eager": the weights are
kept once, in 16 bits or as codes, and nothing is kept of masks, dropout or repeated heads."""

from __future__ import annotations

import torch
from torch import Tensor

from efftune.errors import refuse_second_derivative
from efftune.linear import Exact
from efftune.linear.contracts import Keep
from efftune.linear.handle import Handle, flatten, load, reshaped, unflatten
from efftune.linear.keep.sampled import Sampled
from efftune.nn.attention import as_heads, as_rows
from efftune.ops.draw_seed import draw_seed
from efftune.ops.dropout import dropout as drop_out
from efftune.ops.sample_rows import row_norms

ROWS = "query_rows"  # the attribute of a module that estimates dk and dv from some query rows: a `Sampled`

# Streams of one seed: keeps take 0 to 3, for q, k, v and the weights; samples of rows one for each group of heads.
_DROPOUT, _SAMPLES = 4, 8


class _EagerAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep: Keep, rows: Keep, seed, scale: float, dropout: float, q, k, v, mask):
        weights = _weights(q, k, mask, scale)
        dropped = drop_out(weights, dropout, seed, _DROPOUT) if dropout else weights
        out = torch.bmm(_groups(dropped, k), _groups(v, k)).view(*q.shape[:3], -1).transpose(1, 2)
        parts = (*(as_rows(t.detach()) for t in (q, k, v)), weights.detach().view(-1, weights.shape[-1]))
        held = [keep.hold(part, seed, stream) for stream, part in enumerate(parts)]
        for part in held:
            if isinstance(part, Handle):
                part.keep()
        saved, ctx.structure = flatten(tuple(held))
        ctx.save_for_backward(seed, *saved)
        ctx.rows, ctx.settings, ctx.shapes = rows, (scale, dropout), [t.shape for t in (q, k, v, weights)]
        ctx.set_materialize_grads(False)
        return reshaped(out.contiguous(), out.shape), dropped

    @staticmethod
    def backward(ctx, dout, dweights):
        refuse_second_derivative("attention")
        seed, *saved = ctx.saved_tensors
        *held, weights = (load(part) for part in unflatten(tuple(saved), ctx.structure))
        q, k, v = (as_heads(part, shape) for part, shape in zip(held, ctx.shapes[:3], strict=True))
        (scale, dropout), need = ctx.settings, ctx.needs_input_grad[5:8]
        weights = weights.view(ctx.shapes[3])
        dq = dk = dv = None
        if dout is not None:
            dout = _groups(dout.transpose(1, 2), k)
        if dout is not None and need[2]:
            dropped = drop_out(weights, dropout, seed, _DROPOUT) if dropout else weights
            dv = _product_t(_groups(dropped, k), dout, ctx.rows, seed, _SAMPLES).view(v.shape)
            del dropped
        if need[0] or need[1]:
            if dout is not None:
                dp = torch.bmm(dout, _groups(v, k).mT).view(weights.shape)
                dp = dp if dweights is None else dp.add_(dweights)
            else:
                dp = dweights.contiguous()
            dp = drop_out(dp, dropout, seed, _DROPOUT) if dropout else dp
            ds = _groups(torch.ops.aten._softmax_backward_data(dp, weights, -1, weights.dtype), k)
            del dp, weights
            if need[0]:
                dq = torch.bmm(ds, _groups(k, k)).mul_(scale).view(q.shape)
            if need[1]:
                stream = _SAMPLES + len(ds)
                dk = _product_t(ds, _groups(q, k), ctx.rows, seed, stream).mul_(scale).view(k.shape)
        return None, None, None, None, None, dq, dk, dv, None


def _groups(t: Tensor, k: Tensor) -> Tensor:
    """(B, H, T, ·) -> (B·Hkv, (H / Hkv)·T, ·): the rows that share a key-value head of k (B, Hkv, S, D)."""
    return t.reshape(k.shape[0] * k.shape[1], -1, t.shape[-1])


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = torch.bmm(_groups(q, k), _groups(k, k).mT).mul_(scale).view(*q.shape[:3], -1)
    if mask is not None:
        scores = scores.add_(mask) if mask.dtype == scores.dtype else scores + mask
    return reshaped(torch.softmax(scores, -1).to(q.dtype), scores.shape)


def _product_t(a: Tensor, b: Tensor, rows: Keep, seed: Tensor, stream: int) -> Tensor:
    """aᵀ·b of a (N, M, S), b (N, M, D), summed over all M rows or estimated from those that are drawn of each N."""
    (n, m, s), d = a.shape, b.shape[-1]
    if not isinstance(rows, Sampled) or rows.rows(m) == m:
        return torch.bmm(a.mT, b)
    a, b = a.reshape(n * m, s), b.reshape(n * m, d)
    idx, weight = rows.select((row_norms(a) * row_norms(b)).view(n, m), seed, stream)
    idx = (idx + m * torch.arange(n, device=idx.device)[:, None]).flatten()
    b = (b.index_select(0, idx) * weight.view(-1, 1)).to(b.dtype)
    return torch.bmm(a.index_select(0, idx).view(n, -1, s).mT, b.view(n, -1, d))


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """None, or why these arguments are left to the model's own function."""
    if torch.compiler.is_compiling():
        return "the compiler decides what backward keeps"
    if not (q.ndim == k.ndim == v.ndim == 4) or k.shape[:3] != v.shape[:3] or q.shape[1] % k.shape[1]:
        return "it takes q (B, H, T, D), k (B, Hkv, S, D) and v (B, Hkv, S, Dv)"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16, not {q.dtype}"
    if not q.numel() or not k.numel():
        return "there is nothing to attend to"
    if mask is not None and not mask.is_floating_point():
        return f"a mask is added to the scores, so it is floating point, not {mask.dtype}"
    if mask is not None and mask.requires_grad:
        return "a mask that trains (a position bias) needs its own gradient"
    return None


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None, dropout: float = 0.0,
    keep: Keep | None = None, rows: Keep | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """weights = dropout(P), P = softmax(scale · q kᵀ + mask); out = weights · v.

    Args:
        q: (B, H, T, D).   k: (B, Hkv, S, D).   v: (B, Hkv, S, Dv), Hkv a divisor of H.   f32 | bf16 | f16.
        mask: broadcastable to (B, H, T, S), added to the scores.   scale: 1/√D if None.   dropout: probability for P.
        keep: how backward keeps q, k, v and P, `Exact()` or `Quantized(bits)`.
        rows: `Exact()`, or `Sampled(ratio)` to estimate the two sums over query rows, dv = Σ_i weights_i dout_i and
            dk = scale · Σ_i dS_i q_i, from `ratio` of the (H/Hkv)·T rows of each key-value head, without bias. Rows are
            drawn in backward, by ‖weights_i‖·‖dout_i‖ and by ‖dS_i‖·‖q_i‖. dq = scale · dS·k, dP = dout·vᵀ and
            dS = P ∘ (dP - rowsum(P ∘ dP)) stay exact. The last takes all of P, so that no byte is saved by it: two of
            the four products of backward shrink to `ratio`, for a pass over P and dS and a draw for each key-value
            head. At 0.3 backward takes 0.68 to 0.93 of the time on a CPU for T = 512 and 1024, and longer for T = 128.
    Returns: out (B, T, H, Dv), contiguous, and weights (B, H, T, S), both differentiable.
    Numerics: those of transformers' eager_attention_forward: scores are rounded to q's dtype, the softmax is computed
        in float32 and rounded once. dS is computed in float32 from P as it was kept, and rounded once. Dropout's mask
        is that of `efftune.ops.dropout`.
    Saved for backward: keep(q), keep(k), keep(v) as they come, and keep(P), exact B·H·T·S elements of q's dtype. (In 16
        bits transformers keeps 6 bytes for each, and 1 or 2 more with dropout.) With dropout or draws, a seed. No mask.
    Raises: ValueError where `why_not` has a reason.
    Source: Vaswani et al. 2017, arXiv:1706.03762; rows: Liu et al. 2023, arXiv:2305.15265.
    """
    reason = why_not(q, k, v, mask)
    if reason is not None:
        raise ValueError(f"eager_attention cannot run this ({reason}); use the model's own function.")
    keep, rows = keep or Exact(), rows or Exact()
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    seed = draw_seed() if dropout or (needed and (keep.random or rows.random)) else None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _EagerAttention.apply(keep, rows, seed, scale, dropout, q, k, v, mask)
