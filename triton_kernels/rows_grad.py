"""Σ_s weight_s · g[idx_s]ᵀ · rows_s: a product whose loads of g gather and scale; no copy of g's rows exists. And the
copy alone, for a product by torch: one pass instead of torch's four."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rows_grad_kernel(
    g_ptr, idx_ptr, weight_ptr, rows_ptr, out_ptr,
    S, N, K, per_split,
    stride_gm, stride_rs,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    # Tiles run in groups of GROUP_N so that the tiles in flight share columns of g and of rows in L2.
    pid = tl.program_id(0)
    num_n, num_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    group = pid // (GROUP_N * num_k)
    size = min(num_n - group * GROUP_N, GROUP_N)
    pid_n = group * GROUP_N + pid % (GROUP_N * num_k) % size
    pid_k = pid % (GROUP_N * num_k) // size
    split = tl.program_id(1)

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < K
    end = min(S, (split + 1) * per_split)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for s in range(split * per_split, end, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        mask_s = offs_s < end
        row = tl.load(idx_ptr + offs_s, mask=mask_s, other=0)
        weight = tl.load(weight_ptr + offs_s, mask=mask_s, other=0.0)
        # 64-bit offsets: M·N passes 2^31 for long batches. The row index already is.
        g_ptrs = g_ptr + row[:, None] * stride_gm + offs_n[None, :]
        rows_ptrs = rows_ptr + offs_s.to(tl.int64)[:, None] * stride_rs + offs_k[None, :]
        g = tl.load(g_ptrs, mask=mask_s[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_S, BLOCK_N)
        x = tl.load(rows_ptrs, mask=mask_s[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_S, BLOCK_K)
        g = (g.to(tl.float32) * weight[:, None]).to(x.dtype)
        acc = tl.dot(tl.trans(g), x, acc, input_precision="ieee")

    out_ptrs = out_ptr + (split.to(tl.int64) * N + offs_n[:, None]) * K + offs_k[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])


def meta(dtype: torch.dtype, n: int) -> dict[str, int]:
    """Tile sizes. float32 products run on the FMA units ("ieee"), where a tile of 128 x 128 would spill,
    and one of 64 x 64 with 32 rows in flight does with Triton 3.6."""
    block_n = max(16, triton.next_power_of_2(n))
    if dtype == torch.float32:
        return dict(BLOCK_N=min(64, block_n), BLOCK_K=64, BLOCK_S=16, GROUP_N=8, num_warps=4, num_stages=2)
    if n <= 32:  # a LoRA rank
        return dict(BLOCK_N=block_n, BLOCK_K=128, BLOCK_S=64, GROUP_N=1, num_warps=4, num_stages=3)
    return dict(BLOCK_N=min(128, block_n), BLOCK_K=128, BLOCK_S=64, GROUP_N=8, num_warps=8, num_stages=3)


def rows_grad(g: Tensor, idx: Tensor, weight: Tensor, rows: Tensor, out: Tensor) -> None:
    """g (M, N), rows of neighbouring elements; idx (S,) int64; weight (S,) f32; rows (S, K); out (N, K) contiguous."""
    if out.numel() == 0:
        return
    (s, k), n = rows.shape, g.shape[1]
    rows = rows.contiguous()
    config = meta(g.dtype, n)
    tiles = triton.cdiv(n, config["BLOCK_N"]) * triton.cdiv(k, config["BLOCK_K"])
    # Few tiles (few columns) would leave most of a GPU idle: S is split, and the parts are added up in a fixed order.
    # Atomic additions would give other bits each time.
    splits = max(1, min(128 // tiles, s // (4 * config["BLOCK_S"])))
    per_split = triton.cdiv(triton.cdiv(s, splits), config["BLOCK_S"]) * config["BLOCK_S"]
    parts = out if splits == 1 else out.new_empty(splits, n, k, dtype=torch.float32)
    rows_grad_kernel[(tiles, splits)](
        g, idx, weight, rows, parts, s, n, k, per_split, g.stride(0), rows.stride(0), **config, enable_fp_fusion=True
    )  # fmt: skip
    if splits > 1:
        out.copy_(parts.sum(0))


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


def scale_meta(n: int) -> dict[str, int]:
    block_n = min(1024, max(16, triton.next_power_of_2(n)))
    return dict(BLOCK_S=2048 // block_n, BLOCK_N=block_n)


def scale_rows(g: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """weight_s · g[idx_s], (S, N) contiguous, of g (M, N) with rows of neighbouring elements."""
    s, n = idx.shape[0], g.shape[1]
    out = g.new_empty(s, n)
    if out.numel():
        config = scale_meta(n)
        grid = triton.cdiv(s, config["BLOCK_S"]), triton.cdiv(n, config["BLOCK_N"])
        scale_rows_kernel[grid](g, idx, weight, out, s, n, g.stride(0), **config, enable_fp_fusion=True)
    return out


def _scale_case(pointer: str, n: int) -> dict:
    types = {"g_ptr": f"*{pointer}", "idx_ptr": "*i64", "weight_ptr": "*fp32", "out_ptr": f"*{pointer}"}
    return {
        "kernel": scale_rows_kernel,
        "types": types | dict.fromkeys(("S", "N", "stride_gm"), "i32"),
        "constants": scale_meta(n),
        "aligned": {"N", "stride_gm"},
    }


def _case(pointer: str, out: str, dtype: torch.dtype, n: int) -> dict:
    config = meta(dtype, n)
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    types = {"g_ptr": f"*{pointer}", "idx_ptr": "*i64", "weight_ptr": "*fp32", "rows_ptr": f"*{pointer}"}
    sizes = ("S", "N", "K", "per_split", "stride_gm", "stride_rs")
    return {
        "kernel": rows_grad_kernel,
        "types": types | {"out_ptr": f"*{out}"} | dict.fromkeys(sizes, "i32"),
        "constants": config,
        "aligned": set(sizes) - {"S"},
        "options": options,
    }


COMPILE_CASES = {
    f"{pointer} N {n}": _case(pointer, pointer if n > 32 else "fp32", dtype, n)
    for pointer, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for n in (16, 64, 4096)
}
COMPILE_CASES |= {f"scale {pointer} N {n}": _scale_case(pointer, n) for pointer in ("bf16", "fp32") for n in (16, 4096)}
