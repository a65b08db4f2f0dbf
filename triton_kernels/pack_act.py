"""Group-wise affine codes of activations, and back. A program takes some groups of one row; rows that follow each other
without a gap, each of whole groups, count as one long row. Offsets within a program are 32 bits, its start is 64."""

import torch
import triton
import triton.language as tl

from efftune.triton_kernels import philox

ELEMENTS = 2048  # of one program, 16 a thread: with 8 a thread the same work around them is a third of the program
MAX_GRID = 65535  # programs in the second and in the third direction


@triton.jit
def tile_of_row(
    rows, K, groups, GROUP: tl.constexpr, WHOLE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr
):
    """This program's row, first group and first column; its columns (BLOCK_G, BLOCK_K) from there, which of them exist,
    and which groups do. Rows take two directions of the grid, since one ends at MAX_GRID."""
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    group = tl.arange(0, BLOCK_G)
    offs = tl.arange(0, BLOCK_K)
    live = group < tl.where(row < rows, tl.minimum(groups - first, BLOCK_G), 0).to(tl.int32)
    col = group[:, None] * GROUP + offs[None, :]
    mask = live[:, None] & (offs < GROUP)[None, :]
    if not WHOLE:  # else the mask is the same along a group, and loads stay wide whatever K
        mask &= col < tl.minimum(K - first * GROUP, BLOCK_G * GROUP).to(tl.int32)
    return row, first, first * GROUP, col, mask, live


@triton.jit
def draws(first, col, seed, stream, GROUP: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) random 16-bit numbers in int32 of the elements first + col: with SHARED, where first and GROUP are
    multiples of 8, eight elements share the words of a block."""
    if SHARED:
        block = tl.arange(0, ROWS)[:, None] * (GROUP // 8) + tl.arange(0, COLS // 8)[None, :]
        return tl.reshape(philox.rounding(seed, (first >> 3) + block, stream), (ROWS, COLS))
    else:
        linear = tl.reshape(first + col, (ROWS * COLS,))
        w0, w1, w2, w3 = philox.words(seed, linear >> 3, stream, philox.ROUNDING)
        which = (linear & 7).to(tl.int32)
        pair = which >> 1
        word = tl.where(pair < 2, tl.where(pair == 0, w0, w1), tl.where(pair == 2, w2, w3))
        half = tl.where((which & 1) == 0, word & 0xFFFF, word >> 16)
        return tl.reshape(half.to(tl.int32), (ROWS, COLS))


@triton.jit
def joined(code, SHIFT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, 2 COLS) -> (ROWS, COLS): each pair as low | high << SHIFT."""
    low, high = tl.split(tl.reshape(code, (ROWS, COLS, 2)))
    return low | high << SHIFT


@triton.jit(do_not_specialize=["rows", "K", "groups", "seed", "stream"])
def pack_act_kernel(
    x_ptr,
    codes_ptr,
    stats_ptr,
    rows,
    K,
    groups,  # of one row
    stride_xm,
    stride_cm,
    seed: tl.int64,
    stream: tl.int32,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,  # every group has GROUP elements
    SHARED: tl.constexpr,  # GROUP and K are multiples of 8
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    LEVELS: tl.constexpr = 2**BITS - 1
    row, first, start, col, mask, live = tile_of_row(rows, K, groups, GROUP, WHOLE, BLOCK_G, BLOCK_K)
    x = tl.load(x_ptr + row * stride_xm + start + col, mask=mask, other=0.0).to(tl.float32)

    least = tl.min(tl.where(mask, x, float("inf")), axis=1) + 0.0  # -0 becomes 0
    # min and max may skip a NaN: here it is an infinity.
    most = tl.max(tl.where(mask, tl.where(x == x, x, float("inf")), float("-inf")), axis=1)
    bits = least.to(tl.int32, bitcast=True)
    low_bits = (bits + tl.where(bits < 0, 0xFFFF, 0)) & -65536
    low = low_bits.to(tl.float32, bitcast=True)
    extent = most - low
    finite = tl.abs(extent) < float("inf")
    # div_rn: Triton's "/" is an approximation, and codes are to be the same everywhere.
    bits = tl.div_rn(extent, tl.full((BLOCK_G,), LEVELS, tl.float32)).to(tl.int32, bitcast=True)
    scale = ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)
    scale = tl.maximum(scale, 7.888609052210118e-31)  # 2^-100
    inverse = tl.div_rn(tl.full((BLOCK_G,), 131072.0, tl.float32), scale)
    inverse = tl.where(finite & (extent > 0), inverse, 0.0)
    scale_bits = tl.where(extent == 0, 0, scale.to(tl.int32, bitcast=True))
    stats = tl.where(finite, ((low_bits >> 16) & 0xFFFF) | scale_bits, 0x7FC07FC0)  # two bfloat16, or NaN twice
    tl.store(stats_ptr.to(tl.pointer_type(tl.int32)) + row * groups + first + tl.arange(0, BLOCK_G), stats, mask=live)

    # Where the group is not finite the product is NaN or 0, and maximum takes NaN for 0.
    position = tl.maximum((x - low[:, None]) * inverse[:, None], 0.0)
    position = tl.minimum(position, LEVELS * 131072.0).to(tl.int32)
    if STOCHASTIC:
        draw = draws(row * K + start, col, seed, stream, GROUP, SHARED, BLOCK_G, BLOCK_K)
    else:
        draw = tl.full((BLOCK_G, BLOCK_K), 32768, tl.int32)
    code = (position + 2 * draw + 1) >> 17
    # Codes are joined to bytes and bytes to words: stored one by one they would pass through shared memory first.
    EACH: tl.constexpr = (32 if SHARED else 8) // BITS  # codes of what is stored
    COUNT: tl.constexpr = BLOCK_K // EACH
    if BITS == 4:
        code = joined(tl.where(mask, code, 0) if not SHARED else code, 4, BLOCK_G, BLOCK_K // 2)
    if SHARED:
        code = joined(joined(code, 8, BLOCK_G, 2 * COUNT), 16, BLOCK_G, COUNT)
    at = tl.arange(0, BLOCK_G)[:, None] * (GROUP // EACH) + tl.arange(0, COUNT)[None, :]
    mask = live[:, None] & (tl.arange(0, COUNT) * EACH < GROUP)[None, :]
    if not WHOLE:
        mask &= at * EACH < tl.minimum(K - start, BLOCK_G * GROUP).to(tl.int32)
    codes_ptr += row * stride_cm + start * BITS // 8
    if SHARED:
        tl.store(codes_ptr.to(tl.pointer_type(tl.int32)) + at, code, mask=mask)
    else:
        tl.store(codes_ptr + at, code.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["rows", "K", "groups"])
def unpack_act_kernel(
    codes_ptr,
    stats_ptr,
    out_ptr,
    rows,
    K,
    groups,
    stride_cm,
    stride_om,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, first, start, col, mask, live = tile_of_row(rows, K, groups, GROUP, WHOLE, BLOCK_G, BLOCK_K)
    stats_ptr = stats_ptr.to(tl.pointer_type(tl.int32)) + row * groups + first
    stats = tl.load(stats_ptr + tl.arange(0, BLOCK_G), mask=live, other=0)  # two bfloat16
    low = (stats << 16).to(tl.float32, bitcast=True)
    scale = (stats & -65536).to(tl.float32, bitcast=True)
    codes_ptr += row * stride_cm + start * BITS // 8
    if BITS == 8:
        code = tl.load(codes_ptr + col, mask=mask, other=0)
    else:
        half = tl.arange(0, BLOCK_K // 2)
        at = tl.arange(0, BLOCK_G)[:, None] * (GROUP // 2) + half[None, :]
        here = live[:, None] & (2 * half < GROUP)[None, :]
        if not WHOLE:
            here &= 2 * at < tl.minimum(K - start, BLOCK_G * GROUP).to(tl.int32)
        byte = tl.load(codes_ptr + at, mask=here, other=0)  # each byte once, for two codes
        code = tl.reshape(tl.join(byte & 15, byte >> 4), (BLOCK_G, BLOCK_K))
    x = low[:, None] + scale[:, None] * code.to(tl.float32)  # the product is exact: fused or not, the sum is the same
    tl.store(out_ptr + row * stride_om + start + col, x.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(count: int, k: int, group: int, dense: bool) -> tuple[tuple, tuple, dict]:
    """The grid, (rows, K, groups of a row) as the kernels count them, and constants."""
    rows = count // k
    if dense and k % group == 0:
        rows, k = 1, count
    groups = triton.cdiv(k, group)
    block_k = max(2, triton.next_power_of_2(group))
    whole = k % group == 0
    elements = ELEMENTS if whole and group % 8 == 0 else ELEMENTS // 2  # masks of single elements take registers
    block_g = max(1, min(elements // block_k, triton.next_power_of_2(groups)))
    layers = triton.cdiv(rows, MAX_GRID)
    grid = triton.cdiv(groups, block_g), triton.cdiv(rows, layers), layers
    constants = {"GROUP": group, "WHOLE": whole, "BLOCK_G": block_g, "BLOCK_K": block_k}
    return grid, (rows, k, groups), constants


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
    """x (..., K): dense rows, `row_stride` elements apart, never None; codes, stats: contiguous and new."""
    if x.numel() == 0:
        return
    k = x.shape[-1]
    grid, sizes, constants = _launch(x.numel(), k, group, row_stride == k)
    one = sizes[0] == 1
    pack_act_kernel[grid](
        x,
        codes,
        stats,
        *sizes,
        0 if one else row_stride,
        0 if one else codes.shape[-1],
        seed or 0,
        stream - 2**32 if stream >= 2**31 else stream,
        BITS=bits,
        STOCHASTIC=seed is not None,
        SHARED=group % 8 == sizes[1] % 8 == 0,
        **constants,
        enable_fp_fusion=True,
    )


def unpack_act(codes: torch.Tensor, stats: torch.Tensor, out: torch.Tensor, bits: int, group: int) -> None:
    """codes, stats, out: contiguous."""
    if out.numel() == 0:
        return
    k = out.shape[-1]
    grid, sizes, constants = _launch(out.numel(), k, group, True)
    strides = (0, 0) if sizes[0] == 1 else (codes.shape[-1], k)
    stats = stats if stats.data_ptr() % 4 == 0 else stats.clone()  # min and scale are read as one word
    unpack_act_kernel[grid](codes, stats, out, *sizes, *strides, BITS=bits, **constants, enable_fp_fusion=True)


def _case(kernel, dtype: str, bits: int, group: int, rows: int, k: int, **constants: bool) -> dict:
    """As launched for (rows, k)."""
    _, sizes, found = _launch(rows * k, k, group, True)
    pointers = {"x_ptr": dtype, "codes_ptr": "u8", "stats_ptr": "bf16", "out_ptr": dtype}
    types = {name: f"*{t}" for name, t in pointers.items()} | {"seed": "i64", "stream": "i32"}
    types |= dict.fromkeys(("rows", "K", "groups", "stride_xm", "stride_cm", "stride_om"), "i32")
    constants |= found | {"BITS": bits, "SHARED": group % 8 == sizes[1] % 8 == 0}
    return {
        "kernel": kernel,
        "types": {name: types[name] for name in kernel.arg_names if name in types},
        "constants": {name: value for name, value in constants.items() if name in kernel.arg_names},
        "aligned": {"stride_xm", "stride_cm", "stride_om"} if sizes[0] == 1 or k % 32 == 0 else (),
    }


COMPILE_CASES = {
    "pack8-bf16": _case(pack_act_kernel, "bf16", 8, 64, 4096, 2048, STOCHASTIC=True),
    "pack4-bf16": _case(pack_act_kernel, "bf16", 4, 64, 4096, 2048, STOCHASTIC=True),
    "pack4-f32-48": _case(pack_act_kernel, "fp32", 4, 48, 4096, 2048, STOCHASTIC=True),
    "pack4-f32-ragged": _case(pack_act_kernel, "fp32", 4, 48, 4096, 2047, STOCHASTIC=True),
    "pack8-f16-nearest": _case(pack_act_kernel, "fp16", 8, 128, 4096, 2000, STOCHASTIC=False),
    "unpack8-bf16": _case(unpack_act_kernel, "bf16", 8, 64, 4096, 2048),
    "unpack4-f32": _case(unpack_act_kernel, "fp32", 4, 64, 4096, 2048),
    "unpack4-bf16-ragged": _case(unpack_act_kernel, "bf16", 4, 64, 4096, 2047),
}
