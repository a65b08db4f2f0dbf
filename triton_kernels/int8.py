"""W = codes · scale, one program per row and block of columns."""

import torch
import triton
import triton.language as tl


@triton.jit
def int8_dequantize_kernel(codes_ptr, scales_ptr, out_ptr, K, groups, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs_k < K
    codes = tl.load(codes_ptr + row * K + offs_k, mask=mask).to(tl.float32)
    scale = tl.load(scales_ptr + row * groups + offs_k // GROUP, mask=mask).to(tl.float32)
    tl.store(out_ptr + row * K + offs_k, (codes * scale).to(out_ptr.dtype.element_ty), mask=mask)


def int8_dequantize(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, group: int) -> None:
    """codes (N, K) int8, scales (N, groups), out (N, K): contiguous."""
    if codes.numel() == 0:
        return
    n, k = codes.shape
    block = min(2048, max(16, triton.next_power_of_2(k)))
    int8_dequantize_kernel[(n, triton.cdiv(k, block))](
        codes, scales, out, k, scales.shape[1], group, block, enable_fp_fusion=True
    )


def _case(scales: str, out: str, group: int) -> dict:
    types = {"codes_ptr": "*i8", "scales_ptr": f"*{scales}", "out_ptr": f"*{out}", "K": "i32", "groups": "i32"}
    return {"kernel": int8_dequantize_kernel, "types": types, "constants": {"GROUP": group, "BLOCK_K": 2048}}


COMPILE_CASES = {"bf16": _case("bf16", "bf16", 64), "f32-odd-group": _case("fp32", "fp32", 48)}
