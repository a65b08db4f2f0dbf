"""gᵀz at some of its entries: dot products of rows of a block of tokens that was transposed."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS = 2048  # that are transposed at once
META = dict(BLOCK_S=16, BLOCK_M=128)


@triton.jit
def entries_grad_kernel(
    g_ptr, z_ptr, indices_ptr, out_ptr, M, K, S, ADD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr
):
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    index = tl.load(indices_ptr + offs_s, mask=mask_s, other=0)
    # Entries are sorted: those of a program are of a few rows of g, which then come out of the cache.
    g_row = g_ptr + (index // K).to(tl.int64) * M
    z_row = z_ptr + (index % K).to(tl.int64) * M
    acc = tl.zeros((BLOCK_S, BLOCK_M), dtype=tl.float32)
    for m in range(0, M, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = mask_s[:, None] & (offs_m < M)[None, :]
        g = tl.load(g_row[:, None] + offs_m[None, :], mask=mask, other=0.0)  # (BLOCK_S, BLOCK_M)
        z = tl.load(z_row[:, None] + offs_m[None, :], mask=mask, other=0.0)
        acc += g.to(tl.float32) * z.to(tl.float32)
    total = tl.sum(acc, 1)
    if ADD:
        total += tl.load(out_ptr + offs_s, mask=mask_s, other=0.0)
    tl.store(out_ptr + offs_s, total, mask=mask_s)


def entries_grad(g: Tensor, z: Tensor, indices: Tensor, out: Tensor) -> None:
    """out (S,) float32 = (gᵀz)[indices], for g (M, N) and z (M, K) of any strides."""
    m, k, s = g.shape[0], z.shape[1], indices.shape[0]
    if not m:
        out.zero_()
    if not s:
        return
    for first in range(0, m, TOKENS):
        rows = slice(first, min(first + TOKENS, m))
        g_t, z_t = (x[rows].t().contiguous() for x in (g, z))
        grid = (triton.cdiv(s, META["BLOCK_S"]),)
        entries_grad_kernel[grid](
            g_t, z_t, indices, out, g_t.shape[1], k, s, ADD=first > 0, **META, enable_fp_fusion=True
        )


def _case(pointer: str, add: bool) -> dict:
    types = {"g_ptr": f"*{pointer}", "z_ptr": f"*{pointer}", "indices_ptr": "*i32", "out_ptr": "*fp32"}
    return {
        "kernel": entries_grad_kernel,
        "types": types | dict.fromkeys(("M", "K", "S"), "i32"),
        "constants": {"ADD": add} | META,
        "aligned": {"M", "K"},
    }


COMPILE_CASES = {f"{pointer} add {add}": _case(pointer, add) for pointer in ("bf16", "fp32") for add in (False, True)}
