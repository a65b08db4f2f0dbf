"""Norms of rows, one program per row, rows gathered into a new matrix, and the words of which rows are drawn."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from efftune.triton_kernels import philox

TILE = 256


@triton.jit
def row_norms_kernel(x_ptr, out_ptr, K, stride_xm, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_xm + k + offs_k, mask=offs_k < K - k, other=0.0).to(tl.float32)
        sums += x * x
    tl.store(out_ptr + row, tl.sqrt_rn(tl.sum(sums, axis=0)))


@triton.jit
def gather_rows_kernel(x_ptr, idx_ptr, out_ptr, K, stride_xm, BLOCK_K: tl.constexpr):
    pid_s = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs_k < K
    row = tl.load(idx_ptr + pid_s)
    tl.store(out_ptr + pid_s * K + offs_k, tl.load(x_ptr + row * stride_xm + offs_k, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["seed", "stream"])
def words_kernel(
    block_ptr, out_ptr, count, seed: tl.int64, stream: tl.int32, PURPOSE: tl.constexpr, TILE: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = i < count
    w0, w1, w2, w3 = philox.words(seed, tl.load(block_ptr + i, mask=mask, other=0), stream, PURPOSE)
    tl.store(out_ptr + i, w0.to(tl.int64), mask=mask)
    tl.store(out_ptr + count + i, w1.to(tl.int64), mask=mask)
    tl.store(out_ptr + 2 * count + i, w2.to(tl.int64), mask=mask)
    tl.store(out_ptr + 3 * count + i, w3.to(tl.int64), mask=mask)


def _block(k: int) -> int:
    return min(2048, max(16, triton.next_power_of_2(k)))


def row_norms(x: Tensor, out: Tensor) -> None:
    """x (M, K), rows of neighbouring elements; out (M,) f32."""
    if out.numel():
        row_norms_kernel[(x.shape[0],)](x, out, x.shape[1], x.stride(0), _block(x.shape[1]), enable_fp_fusion=True)


def gather_rows(x: Tensor, idx: Tensor) -> Tensor:
    """x (M, K), rows of neighbouring elements; idx (S,) int64 -> x[idx] (S, K)."""
    out = x.new_empty(idx.shape[0], x.shape[1])
    if out.numel():
        s, k = out.shape
        gather_rows_kernel[(s, triton.cdiv(k, _block(k)))](
            x, idx, out, k, x.stride(0), _block(k), enable_fp_fusion=True
        )
    return out


def words(seed: int, block: Tensor, stream: int, purpose: int) -> tuple[Tensor, ...]:
    """`philox.philox` of efftune.ops: four words of each block, int64. block: (n,) int64, contiguous."""
    out, count = block.new_empty(4, block.numel()), block.numel()
    if count:
        stream = stream - 2**32 if stream >= 2**31 else stream
        grid = (triton.cdiv(count, TILE),)
        words_kernel[grid](block, out, count, seed, stream, purpose, TILE, enable_fp_fusion=True)
    return out.unbind()


def _case(kernel, dtype: str, others: dict) -> dict:
    types = {"x_ptr": f"*{dtype}"} | others | {"K": "i32", "stride_xm": "i32"}
    return {"kernel": kernel, "types": types, "constants": {"BLOCK_K": 2048}, "aligned": {"K", "stride_xm"}}


COMPILE_CASES = {
    "norms bf16": _case(row_norms_kernel, "bf16", {"out_ptr": "*fp32"}),
    "norms fp32": _case(row_norms_kernel, "fp32", {"out_ptr": "*fp32"}),
    "gather bf16": _case(gather_rows_kernel, "bf16", {"idx_ptr": "*i64", "out_ptr": "*bf16"}),
    "gather fp32": _case(gather_rows_kernel, "fp32", {"idx_ptr": "*i64", "out_ptr": "*fp32"}),
    "words": {
        "kernel": words_kernel,
        "types": {"block_ptr": "*i64", "out_ptr": "*i64", "count": "i64", "seed": "i64", "stream": "i32"},
        "constants": {"PURPOSE": 5, "TILE": TILE},
    },
}
