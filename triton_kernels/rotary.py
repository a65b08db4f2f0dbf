"""Rotary position embedding, one program per token of a sample and block of heads."""

import torch
import triton
import triton.language as tl


@triton.jit
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    H,
    T,
    HALF,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_ob,
    stride_oh,
    stride_ot,
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
    offs_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (offs_h < H)[:, None] & mask_d[None, :]
    x_ptrs = x_ptr + b * stride_xb + t * stride_xt + offs_h[:, None] * stride_xh + offs_d[None, :]  # (BLOCK_H, BLOCK_D)
    x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + b * stride_ob + t * stride_ot + offs_h[:, None] * stride_oh + offs_d[None, :]
    tl.store(out_ptrs, (x1 * c1 - x2 * s1).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + HALF, (x2 * c2 + x1 * s2).to(out_ptr.dtype.element_ty), mask=mask)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, transposed: bool) -> None:
    """x and out (B, H, T, D), cos and sin (B or 1, T, D), all with adjacent elements in a row."""
    if x.numel() == 0:
        return
    b, h, t, d = x.shape
    block_d = triton.next_power_of_2(d // 2)
    block_h = min(triton.next_power_of_2(h), max(1, 1024 // block_d))
    tables = (s for table in (cos, sin) for s in (table.stride(0) if table.shape[0] > 1 else 0, table.stride(1)))
    grid = (b * t, triton.cdiv(h, block_h))
    strides = (*x.stride()[:3], *out.stride()[:3], *tables)
    rotary_kernel[grid](x, cos, sin, out, h, t, d // 2, *strides, transposed, block_h, block_d, enable_fp_fusion=True)


def _case(dtype: str, table_dtype: str, transposed: bool) -> dict:
    strides = tuple(f"stride_{name}" for name in ("xb", "xh", "xt", "ob", "oh", "ot", "cb", "ct", "sb", "st"))
    pointers = {"x_ptr": dtype, "cos_ptr": table_dtype, "sin_ptr": table_dtype, "out_ptr": dtype}
    return {
        "kernel": rotary_kernel,
        "types": {name: f"*{t}" for name, t in pointers.items()} | dict.fromkeys(("H", "T", "HALF", *strides), "i32"),
        "constants": {"TRANSPOSED": transposed, "BLOCK_H": 32, "BLOCK_D": 32},
        "aligned": ("HALF", *strides),
    }


COMPILE_CASES = {
    "bf16": _case("bf16", "bf16", False),
    "bf16-transposed": _case("bf16", "bf16", True),
    "f16-f32": _case("fp16", "fp32", False),
    "f32-transposed": _case("fp32", "fp32", True),
}
