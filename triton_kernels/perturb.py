"""out = w + a z. Programs cover tiles that start at multiples of TILE of the offset, so blocks are drawn whole."""

import torch
import triton
import triton.language as tl
from efftune.triton_kernels import philox

TILE = 1024


@triton.jit(do_not_specialize=["a", "seed", "stream"])
def perturb_kernel(
    w_ptr,
    out_ptr,
    count,
    a: tl.float32,
    seed: tl.int64,
    stream: tl.int32,
    first_tile: tl.int64,
    head,
    SIGN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    tile = first_tile + pid
    if SIGN:
        z = philox.sign(seed, tile * (TILE // 128) + tl.arange(0, TILE // 128), stream, TILE // 128)
    else:
        z = philox.normal(seed, tile * (TILE // 4) + tl.arange(0, TILE // 4), stream)
        z = tl.reshape(z, (TILE,))
    i = pid * TILE - head + tl.arange(0, TILE)
    mask = (i >= 0) & (i < count)
    w = tl.load(w_ptr + i, mask=mask).to(tl.float32)
    y = w + a * z
    if STOCHASTIC:
        random = philox.rounding(seed, tile * (TILE // 8) + tl.arange(0, TILE // 8), stream)
        y = philox.round_stochastic(y, tl.reshape(random, (TILE,)), w_ptr.dtype.element_ty)
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=mask)


def perturb(
    w: torch.Tensor, out: torch.Tensor, a: float, seed: int, stream: int, offset: int, sign: bool, stochastic: bool
) -> None:
    """w, out: contiguous, f32 | bf16 | f16, out may be w."""
    if w.numel() == 0:
        return
    first_tile, head = divmod(offset, TILE)
    stream = stream - 2**32 if stream >= 2**31 else stream
    grid = (triton.cdiv(head + w.numel(), TILE),)
    stochastic = stochastic and w.dtype != torch.float32
    perturb_kernel[grid](
        w, out, w.numel(), a, seed, stream, first_tile, head, sign, stochastic, TILE, enable_fp_fusion=True
    )


def _case(dtype: str, sign: bool, stochastic: bool) -> dict:
    types = {"w_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "count": "i64", "a": "fp32", "seed": "i64", "stream": "i32"}
    types |= {"first_tile": "i64", "head": "i32"}
    return {"kernel": perturb_kernel, "types": types, "constants": dict(SIGN=sign, STOCHASTIC=stochastic, TILE=TILE)}


COMPILE_CASES = {
    "normal-f32": _case("fp32", False, False),
    "normal-bf16": _case("bf16", False, False),
    "normal-bf16-stochastic": _case("bf16", False, True),
    "normal-f16-stochastic": _case("fp16", False, True),
    "sign-bf16": _case("bf16", True, False),
}
