"""weight_s · g[idx_s] in one pass, for the product Σ_s weight_s · g[idx_s]ᵀ · rows_s by torch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def scale_rows_kernel(
    g_ptr, idx_ptr, weight_ptr, out_ptr, S, N, stride_gm, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_s = offs_s < S
    row = tl.load(idx_ptr + offs_s, mask=mask_s, other=0)
    weight = tl.load(weight_ptr + offs_s, mask=mask_s, other=0.0)
    mask = mask_s[:, None] & (offs_n < N)[None, :]
    g = tl.load(g_ptr + row[:, None] * stride_gm + offs_n[None, :], mask=mask, other=0.0)  # (BLOCK_S, BLOCK_N)
    scaled = g.to(tl.float32) * weight[:, None]
    tl.store(out_ptr + offs_s[:, None] * N + offs_n[None, :], scaled.to(out_ptr.dtype.element_ty), mask=mask)


def meta(n: int) -> dict[str, int]:
    block_n = min(1024, max(16, triton.next_power_of_2(n)))
    return dict(BLOCK_S=2048 // block_n, BLOCK_N=block_n)


def scale_rows(g: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """weight_s · g[idx_s], (S, N) contiguous, of g (M, N) with rows of neighbouring elements."""
    s, n = idx.shape[0], g.shape[1]
    out = g.new_empty(s, n)
    if out.numel():
        config = meta(n)
        grid = triton.cdiv(s, config["BLOCK_S"]), triton.cdiv(n, config["BLOCK_N"])
        scale_rows_kernel[grid](g, idx, weight, out, s, n, g.stride(0), **config, enable_fp_fusion=True)
    return out


def _case(pointer: str, n: int) -> dict:
    types = {"g_ptr": f"*{pointer}", "idx_ptr": "*i64", "weight_ptr": "*fp32", "out_ptr": f"*{pointer}"}
    return {
        "kernel": scale_rows_kernel,
        "types": types | dict.fromkeys(("S", "N", "stride_gm"), "i32"),
        "constants": meta(n),
        "aligned": {"N", "stride_gm"},
    }


COMPILE_CASES = {f"{pointer} N {n}": _case(pointer, n) for pointer in ("bf16", "fp32") for n in (16, 4096)}
