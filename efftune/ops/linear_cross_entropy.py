"""Cross-entropy of a language-model head, whose logits exist one tile at a time.

A row of logits and its gradient with respect to `hidden` concern one token only: forward computes both, for a block of
tokens at a time. The gradient of the weight sums over tokens, so it has to wait for dy; backward computes the logits
again, for a block of the vocabulary at a time. Then the rows of dW are finished by one product over all tokens, with no
float32 dW beside them, and a frozen head costs what it costs without this: two products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from efftune.errors import refuse_second_derivative
from efftune.ops._available import ANY, extension, kernels
from efftune.ops._op import Op, forced_backend, use_backend

BLOCK = 2**21  # elements of the weight that are widened at a time
PART = 256  # columns of the vocabulary that a product of few tokens sums at a time

_LOW = (torch.bfloat16, torch.float16)


# ---- one tile: z (rows, cols) are the logits of columns first..first + cols, without their bias ----
#
# norm (2, rows) is the maximum of each row of logits and 1 / Σ exp(logit - maximum): the softmax is a product with it.
# The sum's logarithm, which is 8 to 16, would round by up to 2^-21 and with it the whole row of the softmax.


def _torch_tile(z, bias, targets, norm, loss, dy, dz, first, vocabulary, ignore_index, softcap, smoothing):
    """loss and norm of whole rows, if loss is not None; the gradient of z times dy, if dz is not None (it may be z)."""
    y = z.to(norm.dtype)
    y = y if bias is None else y + bias
    u = torch.tanh(y / softcap) if softcap else None
    y = y if u is None else softcap * u
    counted = targets != ignore_index
    own = ((targets >= first) & (targets < first + y.shape[1])).nonzero().squeeze(1)
    column = targets[own] - first
    if loss is not None:
        most = y.amax(1)
        total = (y - most[:, None]).exp_().sum(1)
        at_target = torch.full_like(loss, torch.nan)  # outside the vocabulary there is no logit
        at_target[own] = y[own, column]
        full = total.log() + (most - at_target)
        if smoothing:
            full += smoothing * (at_target - y.mean(1))
        loss.copy_(torch.where(counted, full, 0.0))
        norm[0] = torch.where(counted, most, 0.0)
        norm[1] = torch.where(counted, 1 / total + 0 * at_target, 0.0)
    if dz is not None:
        p = (y - norm[0, :, None]).exp_().mul_(norm[1, :, None]).sub_(smoothing / vocabulary)
        p[own, column] -= 1 - smoothing
        p = p if u is None else p * (1 - u.square())
        p = p if dy is None else p * dy[:, None]
        dz.copy_(torch.where(counted[:, None], p, 0.0))


def _cpp_tile(z, bias, targets, norm, loss, dy, dz, first, vocabulary, ignore_index, softcap, smoothing):
    if z.numel() == 0:
        return
    extension("_cpu").linear_cross_entropy(
        z.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        targets.data_ptr(),
        norm.data_ptr(),
        0 if loss is None else loss.data_ptr(),
        0 if dy is None else dy.data_ptr(),
        *z.shape,
        first,
        vocabulary,
        ignore_index,
        softcap,
        smoothing,
        dz is not None,
        torch.get_num_threads(),
    )


def _triton_tile(*args):
    kernels("linear_cross_entropy").linear_cross_entropy(*args)


# ---- products ----


def _unit() -> str:
    """This processor's unit for bfloat16 products that csrc/bf16_product.cpp uses: "amx", "avx512" or "none"."""
    return extension("_cpu").bf16_unit()


def _widened(tile: Callable, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether operands of 16 bits are products in float32, block by block. torch's operators on a CPU round logits to
    16 bits, and without units they take 3 to 5 times as long as in float32."""
    return (
        device.type == "cpu"
        and dtype in _LOW
        and not (dtype == torch.bfloat16 and tile is _cpp_tile and _unit() != "none")
    )


def _tile_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of the logits that a product gives: float32 where it can be had from 16-bit operands at no cost."""
    return torch.float32 if dtype in _LOW and (device.type == "cpu" or torch.version.cuda) else dtype


def _row_blocks(weight: Tensor, dtype: torch.dtype, low: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(a, b, weight[a:b] in dtype): at once if it has that dtype, else in blocks, in one buffer. Under autocast the
    weight is wider than `low`, the dtype of hidden, and is rounded to it first."""
    rows, cols = weight.shape
    at_once = weight.dtype == dtype == low
    step = rows if at_once else max(16, BLOCK // cols // 16 * 16)
    buffer = weight if at_once else weight.new_empty(min(step, rows), cols, dtype=dtype)
    for a in range(0, rows, step):
        b = min(a + step, rows)
        yield a, b, weight if at_once else buffer[: b - a].copy_(weight[a:b].to(low))


def _aligned(x: Tensor, vocabulary: int) -> int:
    """So many columns of the vocabulary are one product, and the few others another: of 16 bits and 50,257 columns an
    H200 multiplies in 8.5 ms (logits) and 6.3 ms (their gradient and the weight) what it does in 1.2 for 50,256."""
    return vocabulary // 16 * 16 if x.is_cuda and x.dtype in _LOW else vocabulary


def _logits(x: Tensor, weight: Tensor, low: torch.dtype, out: Tensor) -> None:
    whole = _aligned(x, weight.shape[0])
    for begin, part in ((0, weight[:whole]), (whole, weight[whole:])):
        for a, b, w in _row_blocks(part, x.dtype, low) if len(part) else ():
            _product(x, w.t(), out[:, begin + a : begin + b])


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, accumulated in float32 and rounded once to out.dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and torch.version.cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif a.dtype == torch.bfloat16 and out.dtype == torch.float32 and not a.is_cuda:
        _cpp_product(a, b.t(), out)
    else:
        out.copy_(a @ b)


def _cpp_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a bᵀ of bfloat16 operands, whose rows are copied only if their elements are apart."""
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    strides = a.stride(0), b.stride(0), out.stride(0)
    extension("_cpu").bf16_product(
        a.data_ptr(), b.data_ptr(), out.data_ptr(), (*out.shape, a.shape[1]), strides, _unit(), torch.get_num_threads()
    )


def _times(dz: Tensor, weight: Tensor, product: torch.dtype, low: torch.dtype) -> Tensor:
    """dz · weight (rows, K)."""
    if dz.dtype != product:
        return _split_product(dz, weight)
    if weight.dtype == dz.dtype == low:
        return _sum_in_parts(dz, weight)
    dx = dz.new_zeros(dz.shape[0], weight.shape[1])
    for a, b, w in _row_blocks(weight, dz.dtype, low):
        dx += _sum_in_parts(dz[:, a:b], w)
    return dx


def _sum_in_parts(dz: Tensor, w: Tensor) -> Tensor:
    """dz · w. MKL sums a product of less than 4 rows (of 8 on some processors) term by term, which over 32,000 columns
    errs 14 times as much as its blocks do: where there are few rows, parts of the sum are added at the end."""
    rows, parts, whole = dz.shape[0], dz.shape[1] // PART, _aligned(dz, dz.shape[1])
    if 0 < whole < dz.shape[1]:  # the small product first: what is rounded on the way is little
        return (dz[:, whole:] @ w[whole:]).addmm_(dz[:, :whole], w[:whole])
    if dz.is_cuda or dz.dtype in _LOW or rows >= 16 or parts < 2:
        return dz @ w
    end = parts * PART
    products = torch.bmm(dz[:, :end].unflatten(1, (parts, PART)).transpose(0, 1), w[:end].unflatten(0, (parts, PART)))
    return products.sum(0).addmm_(dz[:, end:], w[end:])


def _split_product(dz: Tensor, b: Tensor) -> Tensor:
    """dz · b for dz in float32, which is destroyed, and b in bfloat16, on a CPU with units: dz as a sum of two bfloat16
    numbers has 16 bits, at twice the cost. With 8 the result would be off by as much again as its own rounding, and by
    more where terms cancel. The first product is so small that its rounding is no matter."""
    high = dz.to(torch.bfloat16)
    low = dz.sub_(high).to(torch.bfloat16)
    return torch.addmm(low @ b, high, b)


def _operands(tile: Callable, hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, Tensor]:
    """The dtype of the operands of products, and the weight: under autocast it is rounded here or block by block."""
    if _widened(tile, hidden.device, hidden.dtype):
        return torch.float32, weight
    return hidden.dtype, weight.to(hidden.dtype)


def _rounds_gradient(device: torch.device) -> bool:
    """Whether the gradient of logits is rounded to the dtype of hidden, for products of 16 bits on both sides."""
    return device.type == "cuda"


def _stride(cols: int, device: torch.device) -> int:
    """From row to row of a tile: on a GPU a multiple of 16 elements, since products and vectors of loads need rows at
    multiples of 16 bytes, and a vocabulary of 50257 would have one in eight there."""
    return -(-cols // 16) * 16 if device.type == "cuda" else cols


def _tiles(hidden: Tensor, rows: int, cols: int, gradient: bool = True) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Memory for at most so many logits, and for their gradient. What it gives are the tiles for a number of rows and
    columns."""
    z = hidden.new_empty(rows * _stride(cols, hidden.device), dtype=_tile_dtype(hidden.device, hidden.dtype))
    apart = gradient and _rounds_gradient(hidden.device) and z.dtype != hidden.dtype
    dz = torch.empty_like(z, dtype=hidden.dtype) if apart else z

    def tile(rows: int, cols: int) -> tuple[Tensor, Tensor]:
        stride = _stride(cols, hidden.device)
        z_here, dz_here = (t[: rows * stride].view(rows, stride)[:, :cols] for t in (z, dz))
        return z_here, dz_here

    return tile


def _tokens(m: int, vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits exist at once: a sixteenth of them, in tiles of at most 2^27 elements, and no smaller than
    pays: on a GPU a product of fewer than some 256 tokens takes as long as reading the weight."""
    least = 2**25 if device.type == "cuda" else 2**23
    step = min(max(m // 16, least // vocabulary), 2**27 // vocabulary)
    return step // 64 * 64 if step > 64 else max(16, step)


def _columns(m: int, vocabulary: int, device: torch.device) -> int:
    """Columns of the vocabulary whose logits exist at once, for all tokens: 2^23 elements. Where 256 columns (on a GPU
    1024: a product of less does not fill it) are more, the tile grows, but stays below `hidden` or four times it."""
    least = 1024 if device.type == "cuda" else 256
    return min(vocabulary, max(least, 2**23 // max(m, 1) // 256 * 256))


def _blocks(total: int, step: int) -> list[tuple[int, int]]:
    """[(a, b)]: blocks of `step`; where less than half of one remains, the last two share it. A last block of a single
    token would read the whole weight for it, and libraries sum the products of few rows term by term. Their fast
    kernels for GPUs want sizes in multiples of 16 at least, so only the last block has what is left over of them."""
    starts = list(range(0, total, step))
    if len(starts) > 1 and total - starts[-1] < step / 2:
        multiple = 256 if step >= 1024 else 16 if step >= 64 else 1
        starts[-1] = starts[-2] + (total - starts[-2]) // 2 // multiple * multiple
    return list(pairwise([*starts, total]))


# ---- the two operators ----


def _run_forward(tile: Callable, hidden, weight, bias, targets, ignore_index, smoothing, softcap, need_dx):
    loss, norm, dx = _forward_fake(hidden, weight, bias, targets, ignore_index, smoothing, softcap, need_dx)
    (m, _), vocabulary = hidden.shape, weight.shape[0]
    if not hidden.is_cuda:
        _check_targets(targets, vocabulary, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        product, weight = _operands(tile, hidden, weight)
        bias = None if bias is None else bias.to(loss.dtype).contiguous()
        step = _tokens(m, vocabulary, hidden.device)
        tiles = _tiles(hidden, min(step, m), vocabulary, need_dx)
        for a, b in _blocks(m, step):
            z, dz = tiles(b - a, vocabulary)
            _logits(hidden[a:b].to(product), weight, hidden.dtype, z)
            here = norm.new_empty(2, b - a)
            rows = targets[a:b], here, loss[a:b], None
            tile(z, bias, *rows, dz if need_dx else None, 0, vocabulary, ignore_index, softcap or 0.0, smoothing)
            norm[:, a:b] = here
            if need_dx:
                dx[a:b] = _times(dz, weight, product, hidden.dtype)
    return loss, norm, dx


def _forward_fake(hidden, weight, bias, targets, ignore_index, smoothing, softcap, need_dx):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(hidden.shape[0], dtype=wide)
    return loss, loss.new_empty(2, loss.shape[0]), hidden.new_empty(hidden.shape if need_dx else (0, hidden.shape[1]))


def _run_backward(
    tile: Callable, dy, hidden, weight, bias, targets, norm, ignore_index, smoothing, softcap, need_dw, need_db
):
    dw, db = _backward_fake(dy, hidden, weight, bias, targets, norm, ignore_index, smoothing, softcap, need_dw, need_db)
    (m, _), vocabulary = hidden.shape, weight.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):
        product, weight = _operands(tile, hidden, weight)
        x = hidden.to(product)
        step = _columns(m, vocabulary, hidden.device)
        tiles = _tiles(hidden, m, step)
        for a, b in _blocks(vocabulary, step):
            z, dz = tiles(m, b - a)
            _logits(x, weight[a:b], hidden.dtype, z)
            bias_here = None if bias is None else bias[a:b].to(norm.dtype).contiguous()
            rows = targets, norm, None, dy
            tile(z, bias_here, *rows, dz, a, vocabulary, ignore_index, softcap or 0.0, smoothing)
            if need_db:
                db[a:b] = dz.sum(0, dtype=norm.dtype)
            if need_dw and dz.dtype == product:
                _product(dz.t(), x, dw[a:b])
            elif need_dw and dw.dtype == product:
                dw[a:b] = _split_product(dz.t(), x)
            elif need_dw:  # autocast: dW in float32, which torch's product would round
                torch.mm(dz.t(), x.float(), out=dw[a:b])
    return dw, db


def _backward_fake(dy, hidden, weight, bias, targets, norm, ignore_index, smoothing, softcap, need_dw, need_db):
    dw = weight.new_empty(weight.shape if need_dw else (0, weight.shape[1]))
    return dw, weight.new_empty(0) if bias is None or not need_db else torch.empty_like(bias)


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = targets[((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"linear_cross_entropy takes targets in 0..{vocabulary - 1} or ignore_index={ignore_index}, "
            f"not {int(wrong[0])}; is the weight that of the tokenizer's vocabulary?"
        )


_SETTINGS = "int ignore_index, float label_smoothing, float? softcap"
FORWARD = Op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    f"{_SETTINGS}, bool need_dx) -> (Tensor, Tensor, Tensor)",
    lambda *args: _run_forward(_torch_tile, *args),
    _forward_fake,
)
BACKWARD = Op(
    "linear_cross_entropy_dw(Tensor dy, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor norm, "
    f"{_SETTINGS}, bool need_dw, bool need_db) -> (Tensor, Tensor)",
    lambda *args: _run_backward(_torch_tile, *args),
    _backward_fake,
)


# Strides do not matter: only the tile goes to the kernel.
for _op, _run in ((FORWARD, _run_forward), (BACKWARD, _run_backward)):
    _op.backend("cpp", "cpu", layout=ANY)(lambda *args, run=_run: run(_cpp_tile, *args))
    _op.backend("triton", "cuda", layout=ANY)(lambda *args, run=_run: run(_triton_tile, *args))


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss of each token. Weights, reduction and normalisation are torch's own operations above it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, settings, need_dx, need_dw, need_db):
        loss, norm, dx = FORWARD(hidden, weight, bias, targets, *settings, need_dx)
        again = (hidden, weight, bias, targets, norm) if need_dw or need_db else (None,) * 5
        ctx.save_for_backward(dx if need_dx else None, *again)
        ctx.backend = None if torch.compiler.is_compiling() else forced_backend()
        ctx.settings, ctx.need = settings, (need_dx, need_dw, need_db)
        return loss

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("linear_cross_entropy")
        dx, *again = ctx.saved_tensors
        need_dx, need_dw, need_db = ctx.need
        dw = db = None
        if need_dx:
            dx = (dx * dy[:, None]).to(dx.dtype)  # the product is in float32: one more rounding, no underflow before
        if need_dw or need_db:
            arguments = (dy.contiguous(), *again, *ctx.settings, need_dw, need_db)
            if ctx.backend is None:
                dw, db = BACKWARD(*arguments)
            else:
                with use_backend(ctx.backend):
                    dw, db = BACKWARD(*arguments)
        return dx, dw if need_dw else None, db if need_db else None, None, None, None, None, None


def _check(hidden, weight, targets, bias, reduction, token_weights, label_smoothing, softcap, num_items) -> None:
    name = "linear_cross_entropy"
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name} takes reduction 'mean', 'sum' or 'none', not {reduction!r}.")
    if not hidden.is_floating_point() or hidden.dtype.itemsize < 2:
        raise ValueError(f"{name} takes hidden in float64, float32, bfloat16 or float16, not {hidden.dtype}.")
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(
            f"{name} takes hidden (..., K) and weight (V, K), not {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} takes int64 targets of shape {tuple(hidden.shape[:-1])}, one per row of hidden, not "
            f"{targets.dtype} {tuple(targets.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name} takes a bias ({weight.shape[0]},), not {tuple(bias.shape)}.")
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(
            f"{name} takes one token weight per target, {tuple(targets.shape)}, not {tuple(token_weights.shape)}."
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name} takes label_smoothing in [0, 1], not {label_smoothing}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name} takes a positive softcap or None, not {softcap}.")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"{name} divides by num_items for reduction='mean', not {reduction!r}.")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """loss_i = w_i · (lse(z_i) - (1 - ε) z_i[t_i] - ε mean_v z_i[v]), z = softcap · tanh((hidden Wᵀ + b) / softcap).

    Args:
        hidden: (..., K) f64 | f32 | bf16 | f16.   weight: (V, K).   bias: (V,) or None. One dtype, except under
            autocast, which casts hidden, and where the weight is rounded to the same dtype for the products only.
        targets: (...,) int64 in 0..V-1; a term whose target is ignore_index is 0 and not counted.
        token_weights: w (...,), detached; 1 if None.   label_smoothing: ε in [0, 1].   softcap: None for z = logits.
        reduction: "none" gives the terms, "sum" their sum, "mean" the sum divided by num_items, or else by the number
            of targets that count, whatever their weights. With no such target and no num_items "mean" is NaN, as in
            F.cross_entropy.
        num_items: an int or a 0-d tensor: the terms of all micro-batches together (Hugging Face's num_items_in_batch).
    Returns: f32 (f64 for f64 hidden), 0-d or (...,).   Gradients: hidden, weight and bias, if they require it; a frozen
        weight costs no product and no memory.
    Numerics: the logits, their softmax and the loss are f32, except on ROCm, where the product rounds logits to
        hidden.dtype. On every CPU so is the gradient of the logits; on GPUs it is rounded to hidden.dtype. dhidden
        without dy is rounded to hidden.dtype, and once more after multiplication by dy. dweight and dbias are summed
        over all tokens in f32 and rounded once. Processors differ in the order of f32 sums, and tensor cores truncate
        terms where others round: on an H200 the loss of bf16 and f16 operands is off by some 2^-21 of itself for K
        1024, and by 2^-18 for K 4096. CPUs with bf16 units (AVX512-BF16, AMX) multiply by the gradient of bf16 logits
        as a sum of two bf16 numbers, to 2^-17 of it, and take numbers below 2^-126 as 0; elsewhere, and in f16, blocks
        of the operands are widened to f32.
    Memory: one tile of logits: in forward a sixteenth of the tokens, but 2^23 (on a GPU 2^25) to 2^27 elements; in
        backward 2^23 elements, or 256 columns (on a GPU 1024).
        Products: two in forward (one if hidden needs no gradient), two more in backward if the weight trains, where
        the naive way has three.
    Saved for backward: the gradient of hidden without dy (M·K elements); if weight or bias trains also hidden and the
        targets (inputs), and the maximum and the sum of the exponentials of each row of logits.
    Raises: ValueError for shapes, dtypes or settings that do not fit, and on the CPU for a target outside the
        vocabulary. On a GPU, where looking would stop the queue, such a target makes its loss and its gradients NaN.
        RuntimeError for a second derivative.
    Source: Wijmans et al. 2024, arXiv:2411.09009 (logits recomputed in tiles); Hsu et al. 2024, arXiv:2410.10989
        (gradient of hidden in forward).
    """
    if has_torch_function_variadic(hidden, weight, targets):  # modes see it, as they see F.cross_entropy
        return handle_torch_function(
            linear_cross_entropy, (hidden, weight, targets), hidden, weight, targets, bias, ignore_index=ignore_index,
            reduction=reduction, token_weights=token_weights, label_smoothing=label_smoothing, softcap=softcap,
            num_items=num_items,
        )  # fmt: skip
    _check(hidden, weight, targets, bias, reduction, token_weights, label_smoothing, softcap, num_items)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    elif weight.dtype != hidden.dtype:
        raise ValueError(
            f"linear_cross_entropy takes hidden and weight of one dtype, not {hidden.dtype} and {weight.dtype}; cast "
            "one of them or run under torch.autocast."
        )
    grad = torch.is_grad_enabled()
    need = tuple([grad and t is not None and t.requires_grad for t in (hidden, weight, bias)])
    flat, settings = targets.reshape(-1).contiguous(), (ignore_index, float(label_smoothing), softcap)
    x = hidden.reshape(-1, hidden.shape[-1])
    if any(need):
        loss = _LinearCrossEntropy.apply(x, weight, bias, flat, settings, *need)
    else:
        loss = FORWARD(x, weight, bias, flat, *settings, False)[0]
    if token_weights is not None:
        loss = loss * token_weights.detach().reshape(-1).to(loss.dtype)
    if reduction == "none":
        return loss.view(targets.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / ((flat != ignore_index).sum() if num_items is None else num_items)
