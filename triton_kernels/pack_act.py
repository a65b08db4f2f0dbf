"""Group-wise affine codes of activations, and back. A program takes some consecutive groups, counted over all rows:
their elements are consecutive in contiguous x."""

import torch
import triton
import triton.language as tl

from efftune.triton_kernels import philox

ELEMENTS = 1024  # of one program


@triton.jit
def draws(linear, first, seed, stream, SHARED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) random 16-bit numbers in int32 of the elements `linear`: with SHARED they are first, first + 1, ..
    from a multiple of 8 on, and eight elements share the words of a block."""
    if SHARED:
        block = first // 8 + tl.arange(0, ROWS * COLS // 8)
        return tl.reshape(philox.rounding(seed, block, stream), (ROWS, COLS))
    else:
        block = tl.reshape(linear >> 3, (ROWS * COLS,))
        w0, w1, w2, w3 = philox.words(seed, block, stream, philox.ROUNDING)
        which = tl.reshape(linear & 7, (ROWS * COLS,)).to(tl.int32)
        pair = which >> 1
        word = tl.where(pair < 2, tl.where(pair == 0, w0, w1), tl.where(pair == 2, w2, w3))
        half = tl.where((which & 1) == 0, word & 0xFFFF, word >> 16)
        return tl.reshape(half.to(tl.int32), (ROWS, COLS))


@triton.jit
def upper_half(x, finite):
    """float32 x, a bfloat16 value, as bfloat16; NaN where not finite."""
    bits = tl.where(finite, x.to(tl.int32, bitcast=True), 0x7FC00000)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["seed", "stream"])
def pack_act_kernel(
    x_ptr,
    codes_ptr,
    stats_ptr,
    total,  # groups of all rows
    groups,  # of one row
    K,
    stride_xm,
    seed: tl.int64,
    stream: tl.int32,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    LEVELS: tl.constexpr = 2**BITS - 1
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    at = first + tl.arange(0, BLOCK_G)
    row = at // groups
    start = (at % groups) * GROUP
    offs = tl.arange(0, BLOCK_K)
    col = start[:, None] + offs[None, :]  # (BLOCK_G, BLOCK_K)
    mask = (at < total)[:, None] & (offs < GROUP)[None, :] & (col < K)
    x = tl.load(x_ptr + row[:, None] * stride_xm + col, mask=mask, other=0.0).to(tl.float32)

    least = tl.min(tl.where(mask, x, float("inf")), axis=1) + 0.0  # -0 becomes 0
    most = tl.max(tl.where(mask, x, float("-inf")), axis=1)
    odd = tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), axis=1)  # min and max may skip a NaN
    bits = least.to(tl.int32, bitcast=True)
    low = ((bits + tl.where(bits < 0, 0xFFFF, 0)) & -65536).to(tl.float32, bitcast=True)
    extent = most - low
    finite = (odd == 0) & (tl.abs(extent) < float("inf"))
    constant = extent == 0
    # div_rn: Triton's "/" is an approximation, and codes are to be the same everywhere.
    bits = tl.div_rn(extent, tl.full((BLOCK_G,), LEVELS, tl.float32)).to(tl.int32, bitcast=True)
    scale = ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)
    scale = tl.maximum(scale, 7.888609052210118e-31)  # 2^-100
    inverse = tl.div_rn(tl.full((BLOCK_G,), 131072.0, tl.float32), scale)
    inverse = tl.where(finite & (extent > 0), inverse, 0.0)
    scale = tl.where(constant, 0.0, scale)
    live = at < total
    tl.store(stats_ptr + 2 * at, upper_half(low, finite), mask=live)
    tl.store(stats_ptr + 2 * at + 1, upper_half(scale, finite), mask=live)

    position = (x - low[:, None]) * inverse[:, None]
    position = tl.where(mask & finite[:, None], position, 0.0)
    position = tl.minimum(tl.maximum(position, 0.0), LEVELS * 131072.0).to(tl.int32)
    if STOCHASTIC:
        linear = row[:, None] * K + col
        draw = draws(linear, first * GROUP, seed, stream, SHARED, BLOCK_G, BLOCK_K)
    else:
        draw = tl.full((BLOCK_G, BLOCK_K), 32768, tl.int32)
    code = tl.where(mask, (position + 2 * draw + 1) >> 17, 0)
    if BITS == 8:
        tl.store(codes_ptr + row[:, None] * K + col, code.to(tl.uint8), mask=mask)
    else:
        even, odd_code = tl.split(tl.reshape(code, (BLOCK_G, BLOCK_K // 2, 2)))
        half = tl.arange(0, BLOCK_K // 2)
        byte = start[:, None] // 2 + half[None, :]
        mask = live[:, None] & (2 * half < GROUP)[None, :] & (2 * byte < K)
        tl.store(codes_ptr + row[:, None] * ((K + 1) // 2) + byte, (even | odd_code << 4).to(tl.uint8), mask=mask)


@triton.jit
def unpack_act_kernel(
    codes_ptr, stats_ptr, out_ptr, K, groups, GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs_k < K
    if BITS == 8:
        code = tl.load(codes_ptr + row * K + offs_k, mask=mask)
    else:
        byte = tl.load(codes_ptr + row * ((K + 1) // 2) + offs_k // 2, mask=mask)
        code = (byte >> ((offs_k & 1) * 4).to(tl.uint8)) & 15
    stats_ptr += 2 * (row * groups + offs_k // GROUP)
    low = tl.load(stats_ptr, mask=mask).to(tl.float32)
    scale = tl.load(stats_ptr + 1, mask=mask).to(tl.float32)
    x = low + scale * code.to(tl.float32)  # the product is exact: fused or not, the sum is the same
    tl.store(out_ptr + row * K + offs_k, x.to(out_ptr.dtype.element_ty), mask=mask)


def pack_act(
    x: torch.Tensor,
    codes: torch.Tensor,
    stats: torch.Tensor,
    row_stride: int | None,
    bits: int,
    group: int,
    seed: int | None,
    stream: int,
) -> None:
    """x (..., K): dense rows, `row_stride` elements apart, never None; codes, stats: contiguous."""
    if x.numel() == 0:
        return
    k, total = x.shape[-1], stats.numel() // 2
    block_k = max(2, triton.next_power_of_2(group))
    block_g = max(1, ELEMENTS // block_k)
    shared = block_k == group and group % 8 == 0 and k % group == 0
    stream = stream - 2**32 if stream >= 2**31 else stream
    pack_act_kernel[(triton.cdiv(total, block_g),)](
        x,
        codes,
        stats,
        total,
        stats.shape[-2],
        k,
        row_stride,
        seed or 0,
        stream,
        group,
        bits,
        seed is not None,
        shared,
        block_g,
        block_k,
    )


def unpack_act(codes: torch.Tensor, stats: torch.Tensor, out: torch.Tensor, bits: int, group: int) -> None:
    """codes, stats, out: contiguous."""
    if out.numel() == 0:
        return
    k = out.shape[-1]
    block = min(2048, max(16, triton.next_power_of_2(k)))
    grid = (out.numel() // k, triton.cdiv(k, block))
    unpack_act_kernel[grid](codes, stats, out, k, stats.shape[-2], group, bits, block)


def _pack_case(x: str, bits: int, group: int, stochastic: bool, shared: bool) -> dict:
    types = {"x_ptr": f"*{x}", "codes_ptr": "*u8", "stats_ptr": "*bf16", "total": "i64", "groups": "i32", "K": "i32"}
    types |= {"stride_xm": "i32", "seed": "i64", "stream": "i32"}
    block_k = triton.next_power_of_2(group)
    constants = {"GROUP": group, "BITS": bits, "STOCHASTIC": stochastic, "SHARED": shared}
    constants |= {"BLOCK_G": ELEMENTS // block_k, "BLOCK_K": block_k}
    return {"kernel": pack_act_kernel, "types": types, "constants": constants}


def _unpack_case(out: str, bits: int) -> dict:
    types = {"codes_ptr": "*u8", "stats_ptr": "*bf16", "out_ptr": f"*{out}", "K": "i32", "groups": "i32"}
    return {"kernel": unpack_act_kernel, "types": types, "constants": {"GROUP": 64, "BITS": bits, "BLOCK_K": 2048}}


COMPILE_CASES = {
    "pack8-bf16": _pack_case("bf16", 8, 64, True, True),
    "pack4-bf16": _pack_case("bf16", 4, 64, True, True),
    "pack4-f32-ragged": _pack_case("fp32", 4, 48, True, False),
    "pack8-f16-nearest": _pack_case("fp16", 8, 128, False, False),
    "unpack8-bf16": _unpack_case("bf16", 8),
    "unpack4-f32": _unpack_case("fp32", 4),
}
