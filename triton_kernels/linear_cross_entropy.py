"""Cross-entropy of a tile of logits and the gradient of those logits, one program per row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tanh(x):
    """Cephes' polynomial near 0, where 1 - 2 / (exp(2x) + 1) would lose the relative precision of x; beyond, the latter
    of |x|, because of a negative x it cancels."""
    sq = x * x
    p = sq * -5.70498872745e-3 + 2.06390887954e-2
    p = p * sq - 5.37397155531e-2
    p = p * sq + 1.33314422036e-1
    p = p * sq - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, p * sq * x + x, tl.where(x < 0, -large, large))


@triton.jit
def load_logits(z_ptr, bias_ptr, offs, there, inside, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """tanh((z + bias) / softcap), or z + bias without a cap, in float32. Where z is there, but not inside of the
    logits, the result is of no use."""
    y = tl.load(z_ptr + offs, mask=there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs, mask=inside, other=0.0)
    if HAS_CAP:
        y = tanh(y / softcap)
    return y


@triton.jit(do_not_specialize=["softcap", "smoothing", "first", "ignore_index"])
def linear_cross_entropy_kernel(
    z_ptr, bias_ptr, targets_ptr, norm_ptr, loss_ptr, dy_ptr, dz_ptr,
    cols, stride, vocabulary, first: tl.int64, ignore_index: tl.int64, softcap: tl.float32, smoothing: tl.float32,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DY: tl.constexpr,
    LOSS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    # Whole rows are read and written, up to where the next one starts: 16 divides `stride`, but not every `cols`, by
    # whose mask elements would be loaded one by one.
    z_ptr += row * stride
    dz_ptr += row * stride
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    scale = 1.0
    if HAS_CAP:
        scale = softcap
    if LOSS:
        # A maximum and a sum for each place of the block, joined at the end: no reduction over threads on the way.
        mosts = tl.full((BLOCK,), float("-inf"), tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        totals = tl.zeros((BLOCK,), tl.float32)
        valid = (target >= 0) & (target < vocabulary)
        at_target = load_logits(z_ptr, bias_ptr, target, valid, valid, softcap, HAS_BIAS, HAS_CAP) * scale
        for start in range(0, cols, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            inside = offs < cols
            y = load_logits(z_ptr, bias_ptr, offs, offs < stride, inside, softcap, HAS_BIAS, HAS_CAP) * scale
            totals += tl.where(inside, y, 0.0)
            y = tl.where(inside, y, float("-inf"))
            now = tl.maximum(mosts, y)
            finite = tl.where(now == float("-inf"), 0.0, now)  # nothing yet: -inf - -inf would be NaN
            sums = sums * tl.exp(mosts - finite) + tl.exp(y - finite)
            mosts = now
        most = tl.max(mosts, 0)
        total = tl.sum(sums * tl.exp(mosts - most), 0)
        # most and the logit of a confident token cancel first.
        loss = tl.log(total) + (most - at_target) + smoothing * (at_target - tl.sum(totals, 0) / vocabulary)
        # A target outside the vocabulary has no logit: NaN says so, where a clamp would train on another token.
        factor = tl.where(valid, 1.0 / total, float("nan"))
        loss = tl.where(valid, loss, float("nan"))
        tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss))
        tl.store(norm_ptr + row, tl.where(ignored, 0.0, most))
        tl.store(norm_ptr + rows + row, tl.where(ignored, 0.0, factor))
    else:
        most = tl.load(norm_ptr + row)
        factor = tl.load(norm_ptr + rows + row)
    if GRADIENT:
        uniform = smoothing / vocabulary
        dy = 1.0
        if HAS_DY:
            dy = tl.load(dy_ptr + row)
        for start in range(0, cols, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            there = offs < stride
            u = load_logits(z_ptr, bias_ptr, offs, there, offs < cols, softcap, HAS_BIAS, HAS_CAP)
            dz = tl.exp(scale * u - most) * factor - uniform
            dz -= tl.where(first + offs == target, 1.0 - smoothing, 0.0)
            if HAS_CAP:
                dz *= 1.0 - u * u  # from the tanh itself: precise where the cap saturates
            dz = tl.where(ignored, 0.0, dz * dy)
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=there)


def linear_cross_entropy(
    z: Tensor, bias: Tensor | None, targets: Tensor, norm: Tensor, loss: Tensor | None, dy: Tensor | None,
    dz: Tensor | None, first: int, vocabulary: int, ignore_index: int, softcap: float, smoothing: float,
) -> None:  # fmt: skip
    """z, dz (rows, cols), dz may be z; bias (cols), norm (2, rows), loss, dy (rows) f32; targets int64; contiguous, but
    rows of z and dz may be further apart, where the memory between belongs to them."""
    rows, cols = z.shape
    if rows == 0:
        return
    block = min(4096, max(16, triton.next_power_of_2(cols)))
    linear_cross_entropy_kernel[(rows,)](
        z, z if bias is None else bias, targets, norm, norm if loss is None else loss, norm if dy is None else dy,
        z if dz is None else dz, cols, z.stride(0), vocabulary, first, ignore_index, softcap, smoothing,
        HAS_BIAS=bias is not None, HAS_CAP=softcap != 0, HAS_DY=dy is not None, LOSS=loss is not None,
        GRADIENT=dz is not None, BLOCK=block, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def _case(z: str, dz: str, loss: bool, gradient: bool, extras: bool) -> dict:
    pointers = dict(z_ptr=z, bias_ptr="fp32", targets_ptr="i64", norm_ptr="fp32", loss_ptr="fp32", dy_ptr="fp32")
    types = {name: f"*{dtype}" for name, dtype in (pointers | {"dz_ptr": dz}).items()}
    types |= {"cols": "i32", "stride": "i32", "vocabulary": "i32", "first": "i64", "ignore_index": "i64"}
    types |= {"softcap": "fp32", "smoothing": "fp32"}
    flags = dict(HAS_BIAS=extras, HAS_CAP=extras, HAS_DY=not loss, LOSS=loss, GRADIENT=gradient, BLOCK=4096)
    return {
        "kernel": linear_cross_entropy_kernel,
        "types": types,
        "constants": flags,
        "aligned": {"stride"},
        "options": {"num_warps": 8},
    }


COMPILE_CASES = {
    "loss f32": _case("fp32", "fp32", True, False, False),
    "loss and gradient f32 to bf16": _case("fp32", "bf16", True, True, False),
    "gradient f32 to bf16": _case("fp32", "bf16", False, True, False),
    "loss and gradient f32, bias and cap": _case("fp32", "fp32", True, True, True),
    "gradient f32 to f16, bias and cap": _case("fp32", "fp16", False, True, True),
}
