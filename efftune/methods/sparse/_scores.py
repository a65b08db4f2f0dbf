"""How much each entry of a weight matters: what decides which entries train.

A scorer is a function of a `Matrix`; it returns a function that gives the scores of rows a..b, (b - a, K) float32, of
which the largest are picked. Scores depend on W and the seed alone, so that whoever asks again gets the same picks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.ops.entries_grad import entries_grad
from efftune.ops.entries_linear import entries_linear, entries_linear_t
from efftune.ops.topk_entries import topk_entries

TILE = 2**22  # entries of W in float32 at once
STEPS, OVERSAMPLE = 4, 8  # of the block Krylov iteration


@dataclass(frozen=True)
class Matrix:
    """W (N, K) of a layer, read by rows, and what the recipe says."""

    layer: Linear
    r: int  # for scorers that approximate W
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors that W is multiplied by."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.layer.stored().tensors[0].device

    def rows(self, a: int, b: int) -> Tensor:
        """W[a:b] in float32: W itself, where it has that dtype, and not to be written to."""
        return self.layer.weight_rows(a, b, torch.float32)

    def times(self, right: Tensor) -> Tensor:
        """W·right (N, C), for right (K, C)."""
        return torch.cat([self.rows(a, b) @ right for a, b in tiles(self.shape)])

    def t_times(self, left: Tensor) -> Tensor:
        """Wᵀ·left (K, C), for left (N, C)."""
        made = left.new_zeros(self.shape[1], left.shape[1])
        for a, b in tiles(self.shape):
            made.addmm_(self.rows(a, b).t(), left[a:b])
        return made


@dataclass(frozen=True)
class Picked(Matrix):
    """W at the entries that are picked, as it is now, and 0 elsewhere: of that, products alone."""

    @property
    def dtype(self):
        return self.layer.values.dtype

    @property
    def values(self) -> Tensor:
        return at(lambda a, b: self.layer.weight_rows(a, b, self.dtype), self.shape, self.layer.indices)

    def times(self, right):
        y = right.new_zeros(right.shape[1], self.shape[0])
        return entries_linear(y, right.t().contiguous(), self.layer.indices, self.values).t()

    def t_times(self, left):
        x = left.new_zeros(left.shape[1], self.shape[1])
        return entries_linear_t(x, left.t().contiguous(), self.layer.indices, self.values).t()


Rows = Callable[[int, int], Tensor]  # (a, b) -> the scores of rows a..b (b - a, K), float32


def tiles(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows a..b of an (N, K) matrix, a tile at a time."""
    n, k = shape
    step = max(1, TILE // k)
    return [(a, min(a + step, n)) for a in range(0, n, step)]


def largest(rows: Rows, shape: tuple[int, int], count: int) -> Tensor:
    """The entries of the largest scores, (count,) int32, sorted; of equal ones the first."""
    return topk_entries(lambda: (rows(a, b) for a, b in tiles(shape)), count)


def at(rows: Rows, shape: tuple[int, int], indices: Tensor) -> Tensor:
    """The scores of these entries, sorted: (S,)."""
    k, found = shape[1], []
    for a, b in tiles(shape):
        first, last = torch.searchsorted(indices, torch.tensor([a * k, b * k], device=indices.device)).tolist()
        found.append(rows(a, b).reshape(-1)[indices[first:last].long() - a * k])
    return torch.cat(found)


def magnitude(matrix: Matrix) -> Rows:
    """|W|."""
    return lambda a, b: matrix.rows(a, b).abs()


def small(matrix: Matrix) -> Rows:
    """-|W|: the entries nearest to 0."""
    return lambda a, b: matrix.rows(a, b).abs().neg_()


def random(matrix: Matrix) -> Rows:
    """Uniform, the same on every device."""

    def rows(a: int, b: int) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(f"{matrix.seed}:{a}".encode()))  # torch takes 32 bits
        return torch.rand(b - a, matrix.shape[1], generator=draw).to(matrix.device)

    return rows


def low_rank(matrix: Matrix) -> Rows:
    """|W_r|, the rank-r approximation of W: the principal weights of LIFT."""
    u, v = truncated(matrix)
    return lambda a, b: (u[a:b] @ v).abs_()


SCORERS: dict[str, Callable[[Matrix], Rows]] = {
    scorer.__name__: scorer for scorer in (magnitude, small, random, low_rank)
}


def polar(matrix: Picked) -> Tensor:
    """(U·Vᵀ) at the picks, (S,), of the singular vectors with the r largest singular values: the gradient of their sum,
    and of the nuclear norm where r is min(N, K). See `svd`."""
    u, s, vh = svd(matrix)
    u = torch.where(s > torch.finfo(s.dtype).eps * max(matrix.shape) * s.max(), u, 0)  # those of 0 are any
    return entries_grad(u.t().contiguous(), vh.contiguous(), matrix.layer.indices)


def truncated(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """U (N, r) and V (r, K) with U·V ≈ W_r, the nearest matrix of rank r. See `svd`."""
    u, s, vh = svd(matrix)
    return u * s, vh


def svd(matrix: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """U (N, r), s (r,) and Vᵀ (r, K) with U·diag(s)·Vᵀ ≈ W_r, the nearest matrix of rank r, or of less where W has
    fewer rows or columns.

    Numerics: `matrix.dtype`; W is projected on the block Krylov space of STEPS products with WWᵀ, which finds the picks
        of W_r where singular values have no gap; plain power iteration needs many more products.
    Source: Musco and Musco 2015, arXiv:1504.05477.
    """
    n, k = matrix.shape
    width = min(matrix.r + OVERSAMPLE, n, k)
    draw = torch.Generator().manual_seed(matrix.seed)
    block = matrix.times(torch.randn(k, width, generator=draw).to(matrix.device, matrix.dtype))
    blocks = [torch.linalg.qr(block).Q]
    while len(blocks) <= STEPS and len(blocks) * width < min(n, k):
        blocks.append(torch.linalg.qr(matrix.times(matrix.t_times(blocks[-1]))).Q)
    q = torch.linalg.qr(torch.cat(blocks, 1)).Q
    projected = matrix.t_times(q).t()
    if not bool(projected.isfinite().all()):
        raise EfftuneError(
            f"A weight of {matrix.shape} has NaN or Inf, and no approximation of rank {matrix.r}; train with a lower "
            "learning rate, or look where it was loaded from."
        )
    u, s, vh = torch.linalg.svd(projected, full_matrices=False)
    return q @ u[:, : matrix.r], s[: matrix.r], vh[: matrix.r]
