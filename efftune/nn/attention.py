"""Scaled-dot-product attention that keeps q, k, v and its output as `keep` says, k and v as they come (not expanded to
the number of query heads), and shares one additive mask between all layers. Rows packed with documents need no mask on
a GPU: its kernel is told where they begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from efftune.errors import refuse_second_derivative
from efftune.linear import Exact
from efftune.linear.contracts import Keep
from efftune.linear.function import applied
from efftune.linear.handle import Handle, attach, flatten, load, unflatten
from efftune.ops.draw_seed import draw_seed

aten = torch.ops.aten
KEEP = "keep"  # the attribute of an attention module, as of the other modules of a block
# Where a kernel takes microseconds, choosing the overload at every call costs a third as much.
_on_cpu = aten._scaled_dot_product_flash_attention_for_cpu.default
_on_cpu_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep: Keep, seed, settings: tuple, made: list, q, k, v, mask):
        _, _, dropout, longest = settings
        if type(keep) is Exact and not longest and q.stride(3) == k.stride(3) == v.stride(3) == 1:
            # Kept as they are: the kernels read them where they lie.
            out, rest = _forward(q, k, v, mask, *settings)
            held, shapes = (q, k, v, as_rows(out).detach()), None
        else:
            rows = [as_rows(t) for t in (q, k, v)]
            # What is a view of q is laid out as rows already.
            q, k, v = [t if r._is_view() else as_heads(r, t) for r, t in zip(rows, (q, k, v), strict=True)]
            out, rest = _forward(q, k, v, mask, *settings)
            held = [keep.hold(t.detach(), seed, stream) for stream, t in enumerate((*rows, as_rows(out)))]
            for part in held:
                if isinstance(part, Handle):
                    part.keep()
            shapes = [t.shape for t in (q, k, v)]
        handle = held[3] if isinstance(held[3], Handle) else Handle(_same, (held[3],), elementwise=True)
        made.append(handle)
        # The weights exp(s - lse) of codes with the lse of the exact scores need not sum to 1, and grow without bound
        # where scores are large: 4-bit keeps had training end in infinities. So backward takes lse and output anew,
        # from what it has of q, k and v. (Dropout's mask is in what the kernel gave.)
        again = isinstance(held[0], Handle) and not dropout
        saved, structure = flatten((*held, *(() if again else rest)))
        ctx.save_for_backward(mask, *saved)
        ctx.call = handle.once, again, structure, settings, shapes
        return out

    @staticmethod
    def backward(ctx, dout):
        refuse_second_derivative("attention")
        once, again, structure, settings, shapes = ctx.call
        once.drop()
        mask, *saved = ctx.saved_tensors
        q, k, v, out, *rest = unflatten(tuple(saved), structure)
        if shapes is not None:
            q, k, v = [as_heads(load(part), shape) for part, shape in zip((q, k, v), shapes, strict=True)]
        if again:
            out, rest = _forward(q, k, v, mask, *settings)
        else:
            out = as_heads(load(out), q)
        dq, dk, dv = _backward(dout, q, k, v, mask, out, rest, *settings)
        return None, None, None, None, dq, dk, dv, None


_apply = applied(_Attention)


def _same(x: Tensor) -> Tensor:
    return x


def as_rows(t: Tensor) -> Tensor:
    """(B, H, T, D) -> (B·T, H·D): a view of what a projection gave; a copy of another layout."""
    return t.transpose(1, 2).reshape(t.shape[0] * t.shape[2], -1)


def as_heads(rows: Tensor, like: Tensor | torch.Size) -> Tensor:
    b, h, t, d = like.shape if isinstance(like, Tensor) else like
    return rows.view(b, t, h, d).transpose(1, 2)


# The kernels below sdpa. Its own saved-tensor hooks would hide what is packed from any meter around the model (only the
# innermost hooks are called), so a Function calls the kernels and saves for itself. `longest` above 0: the rows hold
# documents of at most that many tokens, and what is given for the mask is where they begin (`documents`).


def _forward(q, k, v, mask, causal, scale, dropout, longest=0) -> tuple[Tensor, tuple]:
    if longest:
        out, lse, rng, offset, _ = aten._flash_attention_forward(
            *map(_tokens, (q, k, v)), mask, mask, longest, longest, dropout, True, False, scale=scale
        )
        return as_heads(out, q), (lse, rng, offset)
    if q.is_cpu:
        out, lse = _on_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return out, (lse,)
    if mask is None:
        out, lse, cum_q, cum_k, _, _, rng, offset, _ = aten._scaled_dot_product_flash_attention(
            q, k, v, dropout, causal, scale=scale
        )
        empty = q.new_empty(0, dtype=torch.int32)
        return out, (lse, empty if cum_q is None else cum_q, empty if cum_k is None else cum_k, rng, offset)
    k, v, bias = _expanded(k, q), _expanded(v, q), _bias(mask, q, k)
    out, lse, rng, offset = aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, dropout, causal, scale=scale
    )
    return out, (lse, rng, offset)


def _backward(dout, q, k, v, mask, out, rest, causal, scale, dropout, longest=0) -> tuple[Tensor, Tensor, Tensor]:
    if longest:
        lse, rng, offset = rest
        grads = aten._flash_attention_backward(
            *map(_tokens, (dout, q, k, v, out)), lse, mask, mask, longest, longest, dropout, True, rng, offset,
            scale=scale,
        )  # fmt: skip
        dq, dk, dv = (as_heads(grad, like) for grad, like in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv
    if q.is_cpu:
        return _on_cpu_backward(dout, q, k, v, out, rest[0], 0.0, causal, attn_mask=mask, scale=scale)
    if mask is None:
        lse, cum_q, cum_k, rng, offset = rest
        cum_q, cum_k = (None if t.numel() == 0 else t for t in (cum_q, cum_k))
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, cum_q, cum_k, q.shape[2], k.shape[2], dropout, causal, rng, offset, scale=scale
        )
    lse, rng, offset = rest
    wide_k, wide_v = _expanded(k, q), _expanded(v, q)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, wide_k, wide_v, _bias(mask, q, wide_k), out, lse, rng, offset, dropout,
        [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    return dq, _reduced(dk, k), _reduced(dv, v)


def _tokens(t: Tensor) -> Tensor:
    """(B, H, T, D) -> (B·T, H, D), a view of what a projection gave."""
    return t.transpose(1, 2).flatten(0, 1)


def _expanded(t: Tensor, q: Tensor) -> Tensor:
    """k or v with as many heads as q, for a kernel that takes no groups: for the duration of the call."""
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)


def _reduced(dt: Tensor, t: Tensor) -> Tensor:
    return dt if dt.shape == t.shape else dt.view(t.shape[0], t.shape[1], -1, *t.shape[2:]).sum(2)


def _bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def additive(mask: Tensor, dtype: torch.dtype, apart: int = 1) -> Tensor:
    """The mask in dtype, a boolean one (True: attend) as 0 and -inf, with rows a multiple of `apart` elements apart:
    made once for all layers that are given the same tensor."""
    laid_out = mask.stride(-1) == 1 and all(step % apart == 0 for step in mask.stride()[:-1])
    if mask.dtype == dtype and (apart == 1 or laid_out):
        return mask

    def make() -> Tensor:
        width = mask.shape[-1]
        rows = mask.new_empty((*mask.shape[:-1], -(-width // apart) * apart), dtype=dtype)[..., :width]
        return rows.zero_().masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else rows.copy_(mask)

    return _once(mask, ("additive", dtype, apart), make)


def documents(mask: Tensor) -> tuple[Tensor, int] | None:
    """Where the documents of packed rows begin, counted over all rows ((count + 1,) int32, the end last), and the
    longest one's length: if this boolean mask (B, 1, T, T) lets each token see its document up to itself. Else None.

    The answer waits for the GPU, once for all layers that are given the same tensor. transformers waits, too, where it
    makes the mask.
    """

    def find() -> tuple[Tensor, int] | None:
        b, _, t, _ = mask.shape
        seen = mask[:, 0].to(torch.uint8)
        first, count, last = seen.argmax(-1), mask[:, 0].sum(-1), t - 1 - seen.flip(-1).argmax(-1)
        first, count, last = torch.stack([first, count, last]).cpu().view(3, b * t)
        token = torch.arange(t).repeat(b)
        begins = first == token
        # A token sees all from its first to itself, and its first is where the last document began.
        document = torch.where(begins, token, 0).view(b, t).cummax(-1).values.flatten()
        if not ((last == token) & (count == token - first + 1) & (first == document)).all():
            return None
        starts = torch.cat([begins.nonzero().flatten(), torch.tensor([b * t])]).to(torch.int32)
        return starts.to(mask.device), int(starts.diff().max())

    return _once(mask, ("documents",), find)


def _once(mask: Tensor, what: tuple, make: Callable[[], Any]) -> Any:
    """What is made of a mask, until the mask is changed."""
    now = None if mask.is_inference() else mask._version
    known = getattr(mask, "_efftune_made", None)
    if known is None or known[0] != now:
        known = now, {}
        mask._efftune_made = known  # type: ignore[attr-defined]
    if what not in known[1]:
        known[1][what] = make()
    return known[1][what]


def _maybe_packed(q: Tensor, k: Tensor, mask: Tensor) -> bool:
    """Whether `documents` may look at the mask and the kernel for documents could run."""
    if q.device.type != "cuda" or q.dtype == torch.float32 or mask.dtype != torch.bool or q.shape[2] != k.shape[2]:
        return False
    if mask.shape != (q.shape[0], 1, q.shape[2], k.shape[2]):
        return False
    return not is_fake(mask) and not torch.cuda.is_current_stream_capturing()  # nothing may wait for a graph


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> str | None:
    """None, or why these arguments are left to torch's scaled_dot_product_attention."""
    if torch.compiler.is_compiling():
        return "the compiler decides what backward keeps"
    if not (q.ndim == k.ndim == v.ndim == 4) or v.shape[-1] != q.shape[-1] or q.shape[1] % k.shape[1]:
        return "it takes q (B, H, T, D), k and v (B, Hkv, S, D)"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16, not {q.dtype}"
    if not q.numel() or not k.numel():
        return "there is nothing to attend to"
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        return f"a mask is boolean or added to the scores, not {mask.dtype}"
    if mask is not None and mask.requires_grad:
        return "a mask that trains (a position bias) needs its own gradient"
    if q.is_cpu:
        return "the CPU's kernel has no dropout" if dropout else None
    if q.device.type != "cuda":
        return f"there is no kernel for {q.device.type}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"the GPU kernels take head sizes of at most 256 in multiples of 8, not {q.shape[-1]}"
    if mask is None:
        return "the flash kernel takes bfloat16 and float16" if q.dtype == torch.float32 else None
    return None if mask.shape[-1] == k.shape[2] else "the GPU kernel takes masks with a column for each key"


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, scale: float | None = None,
    dropout: float = 0.0, keep: Keep | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale · q kᵀ + mask) v.

    Args:
        q: (B, H, T, D).   k, v: (B, Hkv, S, D), Hkv a divisor of H (grouped queries).   f32 | bf16 | f16.
        mask: broadcastable to (B, H, T, S), boolean (True: attend) or additive.   causal: without a mask only. On a GPU
            a boolean mask (B, 1, T, T) of documents packed into causal rows becomes a list of where they begin.
        scale: 1/√D if None.   dropout: probability for the attention weights (GPU only).
        keep: how backward keeps q, k, v and the output, `Exact()` or `Quantized(bits)`.
    Returns: (B, H, T, D), laid out as (B, T, H, D). Linear layers of efftune that read it keep no input of their own.
    Numerics: those of torch's fused kernels (softmax in float32). With a quantised keep the gradients are those at what
        was kept of q, k and v, from a second forward of the kernel on them.
    Saved for backward: keep(q), keep(k), keep(v), keep(output), one mask for all layers (on a GPU padded to a multiple
        of 8 columns, or of packed rows 4 bytes a document), and with an exact keep 4·H bytes a row.
    Raises: ValueError where `why_not` has a reason.
    Source: Dao et al. 2022, arXiv:2205.14135.
    """
    reason = why_not(q, k, v, mask, dropout)
    if reason is not None:
        raise ValueError(f"attention cannot run this ({reason}); use torch's scaled_dot_product_attention.")
    return attend(q, k, v, mask, causal, scale, dropout, keep)


def attend(q, k, v, mask, causal, scale, dropout, keep) -> Tensor:
    """Computes `attention` of arguments that `why_not` has nothing against."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keep = Exact() if keep is None else keep
    packed = documents(mask) if mask is not None and _maybe_packed(q, k, mask) else None
    if packed is not None:
        mask, longest = packed
    else:
        longest = 0
        mask = None if mask is None else additive(mask, q.dtype, 8 if q.is_cuda else 1)
    settings = causal, scale, dropout, longest
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return _forward(q, k, v, mask, *settings)[0]
    made: list[Handle] = []
    seed = draw_seed() if keep.random else None
    out = _apply(keep, seed, settings, made, q, k, v, mask)
    return attach(out, made[0], out.shape[1] * out.shape[3])
