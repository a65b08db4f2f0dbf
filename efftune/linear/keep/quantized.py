"""Quantized: backward keeps 8- or 4-bit codes of the input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear.handle import Handle
from efftune.linear.keep.exact import Exact
from efftune.ops.pack_act import pack_act, unpack_act


@dataclass(frozen=True)
class Quantized(Exact):
    """Keeps z as codes in groups of a row, rounded stochastically: E[z̃] = z, so a Linear's weight gradient is unbiased.
    (The backward of a nonlinearity or a norm is not linear in z: its gradient is biased, of second order in the error.)

    Args:
        bits: 8 or 4.   group: values that share a (min, scale) pair of bfloat16.
    Saved: bits/8 + 4/group bytes an element, once for all layers that read the same input. Of an input that backward
        can make again from tensors it holds anyway, only those.
    Raises: EfftuneError for other bits or a group that is odd or below 2.
    Source: Pan et al. 2021, arXiv:2111.11124 (Mesa); here with the statistics of the current batch, stored with the
        codes.
    """

    bits: int = 8
    group: int = 64

    random = True

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise EfftuneError(f"activations are kept in 8 or 4 bits, not {self.bits}.")
        if self.group < 2 or self.group % 2:
            raise EfftuneError(f"a group is an even number of at least 2 values, not {self.group}; 64 is usual.")

    def save(self, z, source, seed):
        if source is None:  # under torch.compile, which takes tensors only; the empty one tells K and the dtype
            return *pack_act(z, self.bits, self.group, seed), z.new_empty(0, z.shape[1])
        if source.handle is not None and source.handle.held:
            return (source.handle.keep(),)
        if self not in source.kept:
            source.kept[self] = self.hold(z, seed)
        return (source.kept[self].keep(),)

    def shared(self, rows, source):
        return source is not None

    def operands(self, g, kept):
        if len(kept) == 1:
            return super().operands(g, kept)
        codes, stats, like = kept
        return g, unpack_act(codes, stats, self.bits, self.group, like.shape[1], like.dtype)

    def hold(self, z: Tensor, seed: Tensor | None, stream: int = 0) -> Handle:
        codes, stats = pack_act(z, self.bits, self.group, seed, stream)
        return Handle(partial(_unpack, self.bits, self.group, z.shape[1], z.dtype), (codes, stats))


def _unpack(bits: int, group: int, cols: int, dtype: torch.dtype, codes: Tensor, stats: Tensor) -> Tensor:
    return unpack_act(codes, stats, bits, group, cols, dtype)
