"""y = x scale where the element's Philox word reaches the threshold, else 0."""

import torch
import triton
import triton.language as tl

from efftune.triton_kernels import philox

TILE = 1024


@triton.jit(do_not_specialize=["threshold", "scale", "seed", "stream"])
def dropout_kernel(
    x_ptr, out_ptr, count, threshold: tl.int64, scale: tl.float32, seed: tl.int64, stream: tl.int32, TILE: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    w0, w1, w2, w3 = philox.words(seed, pid * (TILE // 4) + tl.arange(0, TILE // 4), stream, philox.DROPOUT)
    word = tl.reshape(philox.quad(w0, w1, w2, w3), (TILE,))
    i = pid * TILE + tl.arange(0, TILE)
    mask = i < count
    y = tl.load(x_ptr + i, mask=mask).to(tl.float32) * scale
    y = tl.where(word.to(tl.int64) >= threshold, y, 0.0)
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=mask)


def dropout(x: torch.Tensor, out: torch.Tensor, threshold: int, scale: float, seed: int, stream: int) -> None:
    """x, out: contiguous, f32 | bf16 | f16."""
    if x.numel() == 0:
        return
    stream = stream - 2**32 if stream >= 2**31 else stream
    grid = (triton.cdiv(x.numel(), TILE),)
    dropout_kernel[grid](x, out, x.numel(), threshold, scale, seed, stream, TILE, enable_fp_fusion=True)


def _case(dtype: str) -> dict:
    types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "count": "i64", "threshold": "i64", "scale": "fp32"}
    return {"kernel": dropout_kernel, "types": types | {"seed": "i64", "stream": "i32"}, "constants": {"TILE": TILE}}


COMPILE_CASES = {"f32": _case("fp32"), "bf16": _case("bf16")}
