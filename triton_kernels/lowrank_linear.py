"""One kernel for Hopper: the K loop of x·Wᵀ, then the rank-R step h·Bᵀ into the same accumulator, bias, one rounding.
Programs stay, and tiles are copied by descriptor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_at(at, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: they run in groups of GROUP_M rows, so that the tiles in flight share rows of x and of
    w in L2."""
    group = at // (GROUP_M * num_n)
    rows = min(num_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + at % (GROUP_M * num_n) % rows, at % (GROUP_M * num_n) // rows


@triton.jit
def load_transposed(desc, n, k, ROW_MAJOR: tl.constexpr):
    """A tile (BLOCK_K, BLOCK_N) of w (N, K), of which the descriptor knows the memory: w itself or its transpose."""
    return desc.load([n, k]).T if ROW_MAJOR else desc.load([k, n])


@triton.jit
def lowrank_linear_kernel(
    x_desc, w_desc, h_desc, b_desc, y_desc, bias_ptr,
    M, N, K, R,
    HAS_BIAS: tl.constexpr, W_ROW_MAJOR: tl.constexpr, B_ROW_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tile_at(tile, num_m, num_n, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(x_desc.load([m, k]), load_transposed(w_desc, n, k, W_ROW_MAJOR), acc)
        for r in range(0, R, BLOCK_R):
            acc = tl.dot(h_desc.load([m, r]), load_transposed(b_desc, n, r, B_ROW_MAJOR), acc)
        if HAS_BIAS:
            offs_n = n + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        y_desc.store([m, n], acc.to(y_desc.dtype))


TILES = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8}
OPTIONS = {"num_warps": 8, "num_stages": 3}  # wgmma 64 x 256 x 16; four stages leave no room for the tile of y


def _rank_block(r: int) -> int:
    return min(64, max(16, triton.next_power_of_2(r)))


def lowrank_linear(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K), w (N, K), h (M, R), b (N, R), bias (N,) or None -> y (M, N), contiguous, dtype of x. All dense, rows of
    x and h and rows or columns of w and b at multiples of 16 bytes."""
    (m, k), (n, r) = x.shape, b.shape
    y = torch.empty(m, n, device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    tile_m, tile_n, tile_k, tile_r = *list(TILES.values())[:3], _rank_block(r)
    w_rows, b_rows = (t.stride(1) == 1 for t in (w, b))
    descriptors = (
        TensorDescriptor.from_tensor(x, [tile_m, tile_k]),
        TensorDescriptor.from_tensor(w if w_rows else w.t(), [tile_n, tile_k] if w_rows else [tile_k, tile_n]),
        TensorDescriptor.from_tensor(h, [tile_m, tile_r]),
        TensorDescriptor.from_tensor(b if b_rows else b.t(), [tile_n, tile_r] if b_rows else [tile_r, tile_n]),
        TensorDescriptor.from_tensor(y, [tile_m, tile_n]),
    )
    # Interpreted, two programs for many tiles stand for a GPU that is full.
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    grid = (min(programs, triton.cdiv(m, tile_m) * triton.cdiv(n, tile_n)),)
    lowrank_linear_kernel[grid](
        *descriptors, bias if bias is not None else x, m, n, k, r, HAS_BIAS=bias is not None, W_ROW_MAJOR=w_rows,
        B_ROW_MAJOR=b_rows, BLOCK_R=tile_r, **TILES, **OPTIONS, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _case(pointer: str, r: int, transposed: bool) -> dict:
    """Forward with a bias, or its transposed twin."""
    tile_m, tile_n, tile_k, tile_r = *list(TILES.values())[:3], _rank_block(r)
    shapes = {"x": (tile_m, tile_k), "w": (tile_n, tile_k), "h": (tile_m, tile_r), "b": (tile_n, tile_r)}
    if transposed:
        shapes |= {"w": (tile_k, tile_n), "b": (tile_r, tile_n)}
    shapes["y"] = (tile_m, tile_n)
    types = {f"{name}_desc": f"tensordesc<{pointer}[{rows},{columns}]>" for name, (rows, columns) in shapes.items()}
    flags = {"HAS_BIAS": not transposed, "W_ROW_MAJOR": not transposed, "B_ROW_MAJOR": not transposed}
    return {
        "kernel": lowrank_linear_kernel,
        "types": types | {"bias_ptr": f"*{pointer}"} | dict.fromkeys(("M", "N", "K", "R"), "i32"),
        "constants": flags | TILES | {"BLOCK_R": tile_r},
        "options": OPTIONS,
        "targets": ("sm_90",),  # the operator takes no other
    }


COMPILE_CASES = {
    f"{pointer} R {r}{' transposed' if transposed else ''}": _case(pointer, r, transposed)
    for pointer, r, transposed in (("bf16", 16, False), ("bf16", 16, True), ("fp16", 64, True))
}
