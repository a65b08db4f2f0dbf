"""(gᵀz) at some of its entries: the gradient of entries of a weight, without a matrix of the weight's size."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from efftune.ops._available import ROWS, dtype_name, extension, kernels
from efftune.ops._op import Op, forced_backend

BLOCK = 512  # tokens that are transposed at once; the memory of a call is (N + K)·BLOCK elements at most
CHUNK = 2**20  # products of an entry and a token that the reference holds
TILE = {"cpu": 2**20, "cuda": 2**23}  # entries of the product at once, where it is computed by tiles


def check_indices(indices: Tensor, shape: tuple[int, int]) -> None:
    """Raises ValueError where they are not entries n·K + k of a matrix of shape (N, K): (S,) integers that rise, from 0
    to below N·K, which 32 bits hold. On a GPU it waits for it: it is for where indices enter, not for each call."""
    n, k = shape
    if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices are one row of int32 or int64, not {tuple(indices.shape)} {indices.dtype}.")
    if n * k >= 2**31:
        raise ValueError(f"{n} x {k} entries are too many for indices of 32 bits; take a smaller matrix.")
    if not len(indices):
        return
    if int(indices.min()) < 0 or int(indices.max()) >= n * k:
        raise ValueError(
            f"an index lies outside of a matrix of {n} x {k}, in [{int(indices.min())}, {int(indices.max())}]; "
            "take indices of a matrix of this shape."
        )
    if bool((indices[1:] <= indices[:-1]).any()):
        raise ValueError("indices are not sorted, or one is there twice; sort them and drop the second.")


def _fake(g, z, indices):
    if g.ndim != 2 or z.ndim != 2 or g.dtype != z.dtype or not g.dtype.is_floating_point or len(g) != len(z):
        raise ValueError(
            "entries_grad takes matrices g (M, N) and z (M, K) of one floating-point dtype, not "
            f"{tuple(g.shape)} {g.dtype} and {tuple(z.shape)} {z.dtype}."
        )
    if indices.ndim != 1 or indices.dtype != torch.int32:
        raise ValueError(f"entries_grad takes indices (S,) int32, not {tuple(indices.shape)} {indices.dtype}.")
    if g.shape[1] * z.shape[1] >= 2**31:
        raise ValueError(f"entries_grad takes N·K below 2^31, not {g.shape[1]} x {z.shape[1]}.")
    return g.new_empty(indices.shape, dtype=torch.promote_types(g.dtype, torch.float32))


def _reference(g, z, indices):
    out = _fake(g, z, indices)
    check_indices(indices, (g.shape[1], z.shape[1]))
    count = max(1, CHUNK // max(len(g), 1))
    for at, made in zip(indices.split(count), out.split(count)):
        columns = g[:, at // z.shape[1]].to(out.dtype) * z[:, at % z.shape[1]].to(out.dtype)
        made.copy_(columns.sum(0))
    return out


entries_grad_op = Op("entries_grad(Tensor g, Tensor z, Tensor indices) -> Tensor", _reference, _fake)

# Nanoseconds on one core for each element of g and z that is transposed, each product of an entry and a token, and each
# product of the dense gᵀz: fitted to M = 2048, N = K = 1024 and 2048, 0.1 % to 5 % on an AVX2 processor by
# `python -m bench.entries`. With other units for bfloat16 the last is from their rates. It all sets the density from
# which tiles are faster. On a GPU that is not measured: an entry moves 2·M numbers out of the cache in the time of some
# hundred products of tensor cores.
TRANSPOSED = {torch.float32: 1.2, torch.bfloat16: 0.5, torch.float16: 1.5}
DOT = 0.077
DENSE = {torch.float32: 0.026, torch.bfloat16: 0.080, torch.float16: 0.38}
DENSE_BF16 = {"amx": 0.0045, "avx512": 0.010}


@functools.cache
def _dense(dtype: torch.dtype) -> float:
    if dtype == torch.bfloat16 and (rate := DENSE_BF16.get(extension("_cpu").bf16_unit())):
        return rate
    return DENSE[dtype] / (2 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1)


def _tiles_are_faster(g, z, indices):
    # A backend that is asked for by name runs; float64 and what does not fit is for others to refuse.
    if forced_backend() is not None or g.dtype not in TRANSPOSED or g.ndim != 2 or z.ndim != 2:
        return None
    n, k, s = g.shape[1], z.shape[1], indices.numel()
    if g.is_cuda:
        few = 256 * s <= n * k
    else:
        few = extension("_cpu") is None or TRANSPOSED[g.dtype] * (n + k) + DOT * s <= _dense(g.dtype) * n * k
    return None if few else f"for {s} entries of {n} x {k} tiles of the product are faster"


@entries_grad_op.backend("cpp", "cpu", layout=ROWS, of="g z", why_not=_tiles_are_faster)
def _cpp(g, z, indices):
    out, indices = _fake(g, z, indices), indices.contiguous()
    (m, n), k = g.shape, z.shape[1]
    if not m:
        return out.zero_()
    words, tokens = _block(m, n, k, g.dtype)
    block = out.new_empty(n + k, words)
    pointers = g.data_ptr(), z.data_ptr(), indices.data_ptr(), out.data_ptr(), block.data_ptr()
    sizes = (m, n, k), (g.stride(0), z.stride(0)), len(indices), tokens, words
    extension("_cpu").entries_grad(*pointers, *sizes, dtype_name(g.dtype), torch.get_num_threads())
    return out


def _block(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[int, int]:
    """Words of four bytes in each row of a block, and its tokens.

    A block has half the bytes of an N × K matrix at most (or 16 words a row), and rows of an odd number of cache lines:
    at a power of two they fall into the same few places of the cache.
    """
    in_line = 32 if dtype == torch.bfloat16 else 16  # tokens
    room = n * k * dtype.itemsize // (2 * 4 * (n + k)) // 16
    lines = max(1, min(BLOCK * dtype.itemsize // 64 - 1, room, -(-m // in_line)))
    lines -= lines % 2 == 0
    return 16 * lines, in_line * lines


@entries_grad_op.backend("triton", "cuda", layout=ROWS, of="indices", why_not=_tiles_are_faster)
def _triton(g, z, indices):
    out = _fake(g, z, indices)
    kernels("entries_grad").entries_grad(g, z, indices, out)
    return out


@entries_grad_op.backend("torch", "cpu", "cuda")
def _tiles(g, z, indices):
    out = _fake(g, z, indices)
    n, k = g.shape[1], z.shape[1]
    check_indices(indices, (n, k))
    tile = TILE.get(g.device.type, TILE["cuda"])
    step = max(1, min(tile // max(k, 1), -(-n // 4)))  # a quarter of the product at most
    starts = torch.arange(0, n + step, step).clamp(max=n) * k
    cuts = torch.searchsorted(indices, starts.to(indices)).tolist()
    for i, a in enumerate(range(0, n, step)):
        of_tile = slice(cuts[i], cuts[i + 1])
        if cuts[i] < cuts[i + 1]:
            # Without a name, so that a tile is gone before the next one is made.
            picked = (g[:, a : a + step].t() @ z).reshape(-1).index_select(0, indices[of_tile] - a * k)
            out[of_tile] = picked
    return out


def entries_grad(g: Tensor, z: Tensor, indices: Tensor) -> Tensor:
    """out_s = Σ_m g[m, indices_s // K] · z[m, indices_s % K], the entries indices_s of gᵀz.

    Args:
        g: (M, N) f64 | f32 | bf16 | f16, any strides.   z: (M, K), dtype of g.
        indices: (S,) int32 in [0, N·K), n·K + k for the entry (n, k), sorted and distinct (`check_indices`).
    Returns: (S,) f32, of f64 f64. No gradient.
    Numerics: sums in f32. On a CPU a few entries are dot products, whose order of sums follows from M, N, K and the
        dtype alone. Many are taken out of tiles of the product by torch, which rounds to the dtype of g once, as a
        dense gradient is rounded.
    Saved for backward: nothing. During the call there is a block of at most (N + K)·512 elements, or a tile of at most
        a quarter of the product (on a CPU about 2^20 elements).
    Raises: ValueError on shapes or dtypes that do not fit, and on the CPU for indices outside or not sorted. A Triton
        kernel trusts them.
    """
    return entries_grad_op(g, z, indices)
