"""Rotary position embedding, one program per token of a sample and block of heads, of one tensor or of two."""

import torch
import triton
import triton.language as tl


@triton.jit
def _turn(
    x_ptr,  # where the token begins
    out_ptr,
    H,
    HALF,
    stride_xh,
    stride_oh,
    block,
    c1,
    c2,
    s1,
    s2,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    offs_h = block.to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (offs_h < H)[:, None] & (offs_d < HALF)[None, :]
    x_ptrs = x_ptr + offs_h[:, None] * stride_xh + offs_d[None, :]  # (BLOCK_H, BLOCK_D)
    x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + offs_h[:, None] * stride_oh + offs_d[None, :]
    tl.store(out_ptrs, (x1 * c1 - x2 * s1).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + HALF, (x2 * c2 + x1 * s2).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    x_ptr,
    also_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    also_out_ptr,
    H,
    ALSO_H,
    T,
    HALF,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_ab,
    stride_ah,
    stride_at,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_aob,
    stride_aoh,
    stride_aot,
    stride_cb,
    stride_ct,
    stride_sb,
    stride_st,
    TRANSPOSED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HALF
    cos_ptrs = cos_ptr + b * stride_cb + t * stride_ct + offs_d
    sin_ptrs = sin_ptr + b * stride_sb + t * stride_st + offs_d
    c1 = tl.load(cos_ptrs, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_ptrs + HALF, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_ptrs, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_ptrs + HALF, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        s1, s2 = -s2, -s1
    block, blocks = tl.program_id(1), tl.cdiv(H, BLOCK_H)
    # Two branches: of a pointer that is chosen by a condition the compiler forgets the alignment.
    if block < blocks:
        x_at = x_ptr + b * stride_xb + t * stride_xt
        out_at = out_ptr + b * stride_ob + t * stride_ot
        _turn(x_at, out_at, H, HALF, stride_xh, stride_oh, block, c1, c2, s1, s2, BLOCK_H, BLOCK_D)
    else:
        also_at = also_ptr + b * stride_ab + t * stride_at
        also_out_at = also_out_ptr + b * stride_aob + t * stride_aot
        block -= blocks
        _turn(also_at, also_out_at, ALSO_H, HALF, stride_ah, stride_aoh, block, c1, c2, s1, s2, BLOCK_H, BLOCK_D)


def rotary(xs, outs, cos: torch.Tensor, sin: torch.Tensor, steps: tuple[int, ...], transposed: bool) -> None:
    """xs and outs: one or two tensors (B, H, T, D) that differ in H, with adjacent elements in a row like cos and sin
    (B or 1, T, D), whose steps from sample to sample and token to token are `steps`."""
    x, also = xs[0], xs[-1]
    b, h, t, d = x.shape
    also_h = also.shape[1] if len(xs) == 2 else 0
    if (h + also_h) * b * t * d == 0:
        return
    block_d = triton.next_power_of_2(d // 2)
    block_h = min(triton.next_power_of_2(max(h, also_h)), max(1, 1024 // block_d))
    grid = (b * t, triton.cdiv(h, block_h) + triton.cdiv(also_h, block_h))
    rotary_kernel[grid](
        *(x, also, cos, sin, outs[0], outs[-1], h, also_h, t, d // 2),
        *(*x.stride()[:3], *also.stride()[:3], *outs[0].stride()[:3], *outs[-1].stride()[:3], *steps),
        *(transposed, block_h, block_d),
        enable_fp_fusion=True,
    )


def _case(dtype: str, table_dtype: str, transposed: bool) -> dict:
    names = rotary_kernel.arg_names
    strides = [name for name in names if name.startswith("stride_")]
    pointers = {name: f"*{dtype}" for name in names if name.endswith("_ptr")}
    pointers |= dict.fromkeys(("cos_ptr", "sin_ptr"), f"*{table_dtype}")
    return {
        "kernel": rotary_kernel,
        "types": pointers | dict.fromkeys(("H", "ALSO_H", "T", "HALF", *strides), "i32"),
        "constants": {"TRANSPOSED": transposed, "BLOCK_H": 32, "BLOCK_D": 32},
        "aligned": ("HALF", *strides),
    }


COMPILE_CASES = {
    "bf16": _case("bf16", "bf16", False),
    "bf16-transposed": _case("bf16", "bf16", True),
    "f16-f32": _case("fp16", "fp32", False),
    "f32-transposed": _case("fp32", "fp32", True),
}
