"""One kernel: the K loop of x·Wᵀ, then the rank-R step h·Bᵀ into the same accumulator, bias, one rounding. And the same
for Hopper: programs that stay, and tiles that the hardware copies by descriptor."""

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
def lowrank_linear_kernel(
    x_ptr, w_ptr, h_ptr, b_ptr, bias_ptr, y_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_hm, stride_hr, stride_bn, stride_br, stride_ym,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)

    # 64-bit offsets: M·K passes 2^31 for long batches.
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    offs_k = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_r[None, :] * stride_hr
        b_ptrs = b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br
        h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
        acc = tl.dot(h, b, acc, input_precision="ieee")

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def meta(dtype: torch.dtype, m: int, r: int, aligned: bool) -> dict[str, int]:
    """Tile sizes. float32 products run on the FMA units ("ieee"), where a tile of 128 x 128 would spill; so would tiles
    64 deep where addresses and masks of single elements take registers."""
    block_k = 64 if aligned else 32
    block_r = min(block_k, _rank_block(r))
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_R=min(32, block_r), GROUP_M=8, num_warps=4, num_stages=2)
    block_m = 128 if m > 64 else 64
    return dict(BLOCK_M=block_m, BLOCK_N=128, BLOCK_K=block_k, BLOCK_R=block_r, GROUP_M=8, num_warps=8, num_stages=3)


def lowrank_linear(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K), w (N, K), h (M, R), b (N, R), bias (N,) or None -> y (M, N), contiguous, dtype of x."""
    (m, k), (n, r) = x.shape, b.shape
    y = torch.empty(m, n, device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    strides = [stride for t in (x, w, h, b) for stride in t.stride() if stride != 1]
    aligned = all(size % 16 == 0 for size in (n, k, r, *strides)) and all(t.data_ptr() % 16 == 0 for t in (x, w, h, b))
    config = meta(x.dtype, m, r, aligned)
    grid = (triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]),)
    lowrank_linear_kernel[grid](
        x, w, h, b, bias if bias is not None else x, y, m, n, k, r,
        x.stride(0), x.stride(1), w.stride(0), w.stride(1), h.stride(0), h.stride(1), b.stride(0), b.stride(1),
        y.stride(0), HAS_BIAS=bias is not None, **config, enable_fp_fusion=True,
    )  # fmt: skip
    return y


@triton.jit
def load_transposed(desc, n, k, ROW_MAJOR: tl.constexpr):
    """A tile (BLOCK_K, BLOCK_N) of w (N, K), of which the descriptor knows the memory: w itself or its transpose."""
    return desc.load([n, k]).T if ROW_MAJOR else desc.load([k, n])


@triton.jit
def lowrank_linear_tma_kernel(
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


TMA_TILES = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8}
TMA_OPTIONS = {"num_warps": 8, "num_stages": 3}  # wgmma 64 x 256 x 16; four stages leave no room for the tile of y


def _rank_block(r: int) -> int:
    return min(64, max(16, triton.next_power_of_2(r)))


def lowrank_linear_tma(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """As `lowrank_linear`; all dense, rows of x and h and rows or columns of w and b at multiples of 16 bytes."""
    (m, k), (n, r) = x.shape, b.shape
    y = torch.empty(m, n, device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    tile_m, tile_n, tile_k, tile_r = *list(TMA_TILES.values())[:3], _rank_block(r)
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
    lowrank_linear_tma_kernel[grid](
        *descriptors, bias if bias is not None else x, m, n, k, r, HAS_BIAS=bias is not None, W_ROW_MAJOR=w_rows,
        B_ROW_MAJOR=b_rows, BLOCK_R=tile_r, **TMA_TILES, **TMA_OPTIONS, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _case(pointer: str, dtype: torch.dtype, m: int, r: int, transposed: bool) -> dict:
    """Forward (w and b row-major, bias), or its transposed twin (both column-major)."""
    config, other = (meta(dtype, m, r, aligned) for aligned in (True, False))
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    other = {key: value for key, value in other.items() if key in config}
    types = {name: f"*{pointer}" for name in ("x_ptr", "w_ptr", "h_ptr", "b_ptr", "bias_ptr", "y_ptr")}
    sizes = ("M", "N", "K", "R")
    strides = tuple(f"stride_{name}" for name in ("xm", "xk", "wn", "wk", "hm", "hr", "bn", "br", "ym"))
    units = ("stride_xk", "stride_hr", *(("stride_wn", "stride_bn") if transposed else ("stride_wk", "stride_br")))
    constants = dict.fromkeys(units, 1) | {"HAS_BIAS": not transposed}
    return {
        "kernel": lowrank_linear_kernel,
        "types": types | dict.fromkeys((*sizes, *strides), "i32"),
        "constants": constants | config,
        "constants_unaligned": constants | other,
        "aligned": {*sizes, *strides} - {"M", *units},
        "options": options,
    }


def _tma_case(pointer: str, r: int, transposed: bool) -> dict:
    """Forward with a bias, or its transposed twin."""
    tile_m, tile_n, tile_k, tile_r = *list(TMA_TILES.values())[:3], _rank_block(r)
    shapes = {"x": (tile_m, tile_k), "w": (tile_n, tile_k), "h": (tile_m, tile_r), "b": (tile_n, tile_r)}
    if transposed:
        shapes |= {"w": (tile_k, tile_n), "b": (tile_r, tile_n)}
    shapes["y"] = (tile_m, tile_n)
    types = {f"{name}_desc": f"tensordesc<{pointer}[{rows},{columns}]>" for name, (rows, columns) in shapes.items()}
    flags = {"HAS_BIAS": not transposed, "W_ROW_MAJOR": not transposed, "B_ROW_MAJOR": not transposed}
    return {
        "kernel": lowrank_linear_tma_kernel,
        "types": types | {"bias_ptr": f"*{pointer}"} | dict.fromkeys(("M", "N", "K", "R"), "i32"),
        "constants": flags | TMA_TILES | {"BLOCK_R": tile_r},
        "options": TMA_OPTIONS,
    }


COMPILE_CASES = {
    f"{pointer} M {m} R {r}{' transposed' if transposed else ''}": _case(pointer, dtype, m, r, transposed)
    for pointer, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for m, r, transposed in ((8192, 16, False), (8192, 256, True), (16, 16, False))
}
COMPILE_CASES |= {
    f"{pointer} R {r}{' transposed' if transposed else ''} tma": _tma_case(pointer, r, transposed)
    for pointer, r, transposed in (("bf16", 16, False), ("bf16", 16, True), ("fp16", 64, True))
}
