"""out = w + Σ a z. Programs cover tiles that start at multiples of TILE of the offset, so blocks are drawn whole."""

import torch
import triton
import triton.language as tl

from efftune.triton_kernels import philox

TILE = 1024


@triton.jit
def draw(seed, tile, stream, SIGN: tl.constexpr, TILE: tl.constexpr):
    if SIGN:
        return philox.sign(seed, tile * (TILE // 128) + tl.arange(0, TILE // 128), stream, TILE // 128)
    else:
        return tl.reshape(philox.normal(seed, tile * (TILE // 4) + tl.arange(0, TILE // 4), stream), (TILE,))


@triton.jit
def perturb_tile(
    w_ptr,
    out_ptr,
    i,
    mask,
    tile,
    a_ptr,
    seeds_ptr,
    seed,
    draws,
    stream,
    threshold,
    SIGN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SINGLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Elements i of w, which are those of the whole tensor's `tile`."""
    if SINGLE:  # a loop, or w loaded first, would take more registers
        z = draw(seed, tile, stream, SIGN, TILE)
        w = tl.load(w_ptr + i, mask=mask, other=0.0)
        y = tl.fma(tl.load(a_ptr), z, w.to(tl.float32))
    else:
        w = tl.load(w_ptr + i, mask=mask, other=0.0)
        y = w.to(tl.float32)
        for k in range(draws):
            y = tl.fma(tl.load(a_ptr + k), draw(tl.load(seeds_ptr + k), tile, stream, SIGN, TILE), y)
    if STOCHASTIC:
        random = philox.rounding(seed, tile * (TILE // 8) + tl.arange(0, TILE // 8), stream)
        y = philox.round_stochastic(y, tl.reshape(random, (TILE,)), w_ptr.dtype.element_ty)
    small = tl.abs(w.to(tl.float32)) <= threshold
    tl.store(out_ptr + i, tl.where(small, y.to(out_ptr.dtype.element_ty), w), mask=mask)


@triton.jit(do_not_specialize=["seed", "draws", "stream", "threshold"])
def perturb_kernel(
    w_ptr,
    out_ptr,
    count,
    a_ptr,
    seeds_ptr,
    seed: tl.int64,
    draws: tl.int32,
    stream: tl.int32,
    first_tile: tl.int64,
    head,
    threshold: tl.float32,
    SIGN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SINGLE: tl.constexpr,
    TILE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    tile = first_tile + pid
    i = pid * TILE - head + tl.arange(0, TILE)
    mask = (i >= 0) & (i < count)
    perturb_tile(
        w_ptr, out_ptr, i, mask, tile, a_ptr, seeds_ptr, seed, draws, stream, threshold, SIGN, STOCHASTIC, SINGLE, TILE
    )


def perturb(
    w: torch.Tensor,
    out: torch.Tensor,
    a: torch.Tensor,
    seeds: torch.Tensor,
    seed: int,
    stream: int,
    offset: int,
    sign: bool,
    stochastic: bool,
    threshold: float,
) -> None:
    """w, out: contiguous, f32 | bf16 | f16, out may be w. a: f32, one number for each seed. seeds: int64; of a single
    one it is not read. seed: the first."""
    if w.numel() == 0:
        return
    first_tile, head = divmod(offset, TILE)
    stream = stream - 2**32 if stream >= 2**31 else stream
    grid = (triton.cdiv(head + w.numel(), TILE),)
    stochastic = stochastic and a.numel() > 0 and w.dtype != torch.float32
    perturb_kernel[grid](
        w, out, w.numel(), a, seeds, seed, a.numel(), stream, first_tile, head, threshold,
        sign, stochastic, a.numel() == 1, TILE, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensors", "seed", "draws"])
def perturb_many_kernel(
    table_ptr,
    tensors: tl.int32,
    a_ptr,
    seeds_ptr,
    seed: tl.int64,
    draws: tl.int32,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SIGN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SINGLE: tl.constexpr,
    TILE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    low, high = tensors * 0, tensors - 1  # the last tensor whose first tile is not behind this one
    while low < high:
        middle = (low + high + 1) // 2
        behind = tl.load(table_ptr + 6 * middle) > pid
        high = tl.where(behind, middle - 1, high)
        low = tl.where(behind, low, middle)
    row = table_ptr + 6 * low
    w_ptr = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    out_ptr = tl.load(row + 2).to(tl.pointer_type(DTYPE))
    if ALIGNED:  # what a launch tells of an argument by itself
        w_ptr = tl.multiple_of(w_ptr, 16)
        out_ptr = tl.multiple_of(out_ptr, 16)
    stream = tl.load(row + 4).to(tl.int32)
    threshold = tl.load(row + 5).to(tl.int32).to(tl.float32, bitcast=True)
    tile = pid - tl.load(row)
    i = tile * TILE + tl.arange(0, TILE)
    mask = i < tl.load(row + 3)
    perturb_tile(
        w_ptr, out_ptr, i, mask, tile, a_ptr, seeds_ptr, seed, draws, stream, threshold, SIGN, STOCHASTIC, SINGLE, TILE
    )


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def perturb_many(
    w: list[torch.Tensor],
    out: list[torch.Tensor],
    a: torch.Tensor,
    seeds: torch.Tensor,
    seed: int,
    streams: list[int],
    sign: bool,
    stochastic: bool,
    thresholds: list[float],
) -> None:
    """w, out: contiguous, of one dtype, f32 | bf16 | f16. a, seeds, seed: as for `perturb`."""
    # as float32 numbers, which the thresholds are compared as
    limits = torch.tensor(thresholds, dtype=torch.float32, device="cpu").view(torch.int32).tolist()
    rows, tiles, together = [], 0, 0
    for t, o, stream, limit in zip(w, out, streams, limits, strict=True):
        row = [tiles, t.data_ptr(), o.data_ptr(), t.numel(), stream, limit]
        rows.append(row)
        together |= row[1] | row[2]
        tiles += -(-row[3] // TILE)
    if tiles == 0:
        return
    table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=a.is_cuda).to(a.device, non_blocking=True)
    stochastic = stochastic and a.numel() > 0 and w[0].dtype != torch.float32
    perturb_many_kernel[(tiles,)](
        table, len(w), a, seeds, seed, a.numel(), TYPES[w[0].dtype], together % 16 == 0,
        sign, stochastic, a.numel() == 1, TILE, enable_fp_fusion=True,
    )  # fmt: skip


def _case(dtype: str, sign: bool, stochastic: bool, single: bool) -> dict:
    types = {"w_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "count": "i64", "a_ptr": "*fp32", "seeds_ptr": "*i64"}
    types |= {"seed": "i64", "draws": "i32", "stream": "i32", "first_tile": "i64", "head": "i32", "threshold": "fp32"}
    constants = dict(SIGN=sign, STOCHASTIC=stochastic, SINGLE=single, TILE=TILE)
    return {"kernel": perturb_kernel, "types": types, "constants": constants}


def _many(dtype, sign: bool, stochastic: bool, single: bool) -> dict:
    types = {
        "table_ptr": "*i64",
        "tensors": "i32",
        "a_ptr": "*fp32",
        "seeds_ptr": "*i64",
        "seed": "i64",
        "draws": "i32",
    }
    constants = dict(DTYPE=dtype, ALIGNED=True, SIGN=sign, STOCHASTIC=stochastic, SINGLE=single, TILE=TILE)
    return {"kernel": perturb_many_kernel, "types": types, "constants": constants}


COMPILE_CASES = {
    name + ("" if single else "-seeds"): _case(*case, single)
    for single in (True, False)
    for name, case in {
        "normal-f32": ("fp32", False, False),
        "normal-bf16": ("bf16", False, False),
        "normal-bf16-stochastic": ("bf16", False, True),
        "normal-f16-stochastic": ("fp16", False, True),
        "sign-bf16": ("bf16", True, False),
    }.items()
}
COMPILE_CASES |= {
    "many-normal-f32": _many(tl.float32, False, False, True),
    "many-normal-bf16-stochastic": _many(tl.bfloat16, False, True, True),
    "many-normal-bf16-stochastic-seeds": _many(tl.bfloat16, False, True, False),
    "many-sign-f16-stochastic": _many(tl.float16, True, True, True),
}
