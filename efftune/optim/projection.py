"""A change of weights as scalar products with random directions that all share, and the weights made from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from efftune.ops.perturb import perturb
from efftune.ops.philox import round_stochastic, rounding_bits

PIECE = 2**22  # entries of a tensor that are worked on at a time: what the scratch holds


def stretches(entries: int, block: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, width) over a tensor: runs of blocks of one width, at most PIECE entries long; the rest last."""
    whole, length = entries - entries % block, max(1, PIECE // block) * block
    for start in range(0, whole, length):
        yield start, min(start + length, whole), block
    if whole < entries:
        yield whole, entries, entries - whole


def count(entries: int, k: int, block: int) -> int:
    """How many numbers `project` makes of a tensor."""
    return sum((end - start) // width * min(k, width) for start, end, width in stretches(entries, block))


def directions(like: Tensor, seeds: Sequence[int], stream: int, start: int, dist: str) -> Iterator[Tensor]:
    """z(seed) for the entries from `start` on, one seed after the other, each in the memory of the last."""
    zero, z = torch.zeros_like(like), torch.empty_like(like)
    for seed in seeds:
        yield perturb(zero, 1.0, seed=seed, stream=stream, offset=start, dist=dist, out=z)


@torch.no_grad()
def project(change: Tensor, seeds: Sequence[int], *, stream: int, block: int, dist: str, scale: float = 1.0) -> Tensor:
    """a_{b,i} = c/k · Σ_{j in b} z(seed_i, stream, j) · Δ_j, for each block b of `block` consecutive entries of Δ (what
    is left over is a block, too) and the first k = min(len(seeds), entries of b) seeds.

    Args:
        change: Δ, any shape, float32 or float64.   scale: c; 1: unbiased.
    Returns: (numbers,) float32, block after block, for `reconstruct`.
    Numerics: products and sums in the dtype of Δ and on its device; nothing waits for it.
    Cost: k draws for each weight, and as many passes over a scratch of at most PIECE entries.
    """
    flat, found = change.detach().reshape(-1), []
    for start, end, width in stretches(flat.numel(), block):
        piece, block_seeds = flat[start:end], seeds[:width]
        products = piece.new_empty((end - start) // width, len(block_seeds))
        for i, z in enumerate(directions(piece, block_seeds, stream, start, dist)):
            products[:, i] = z.mul_(piece).view(-1, width).sum(1)
        found.append(products.mul_(scale / len(block_seeds)).flatten().float())
    return torch.cat(found) if found else flat.float()


@torch.no_grad()
def reconstruct(
    w: Tensor, a: Tensor, seeds: Sequence[int], *, stream: int, block: int, dist: str, out: Tensor | None = None
) -> Tensor:
    """w_j + Σ_i a_{b,i} · z(seed_i, stream, j) for the entries j of each block b, as `project` cuts them.

    Args:
        w: any shape, f64 | f32 | bf16 | f16.   a: (numbers,) float32.   out: like w, or w itself; None: a new tensor.
    Numerics: those of `perturb` on each block, with stochastic rounding of 16 bits: the sum in float32 (float64 for a
        float64 w), from w on and in the order of the seeds, rounded once.
    Cost: each weight is read and written once, k draws for it, and as many passes over the scratch.
    """
    out = torch.empty_like(w) if out is None else out
    source, a = w.detach().reshape(-1), a.to(w.device)
    made = out.detach().view(-1) if out.is_contiguous() else torch.empty_like(source)
    for start, end, width in stretches(len(source), block):
        y, block_seeds = source[start:end].to(torch.promote_types(w.dtype, torch.float32), copy=True), seeds[:width]
        count = (end - start) // width * len(block_seeds)
        numbers, a = a[:count].view(-1, len(block_seeds)).to(y.dtype), a[count:]
        for i, z in enumerate(directions(y, block_seeds, stream, start, dist)):
            z.view(-1, width).mul_(numbers[:, i : i + 1])
            y.add_(z)  # addcmul_ would round once, on some devices
        if w.dtype.itemsize == 2:
            y = round_stochastic(y, w.dtype, rounding_bits(seeds[0], stream, start, end - start, w.device))
        made[start:end] = y
    return out if out.is_contiguous() else out.copy_(made.view(w.shape))
