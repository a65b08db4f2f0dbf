"""Int8: W as 8-bit integers with one scale per group of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear.contracts import Base, SparseMatrix, Stored, Tensors, add_entries
from efftune.ops.int8 import int8_dequantize, int8_quantize, refuse_infinite
from efftune.ops.lowrank_linear import linear, linear_t


@dataclass(frozen=True)
class Int8(Base):
    """W ≈ codes · scales, codes (N, K) int8 in -127..127, scales (N, ⌈K/group⌉) in the dtype the weight had.

    The error of an entry is at most half a scale, absmax(group)/254 (plus the rounding of the scale to its dtype).
    1 + bytes(scale)/group bytes per weight: 1.03 for bfloat16 and group 64.

    Numerics: each product unpacks W to x.dtype (rounded once), then multiplies as a dense one, and holds that W (N·K
        elements) for its duration. Entries are added to it there, where each is rounded once more. `.to(dtype)` rounds
        the scales, never the codes.
    Raises: ValueError for a weight that is not finite or a group below 1.
    """

    group: int = 64

    names, learns = ("codes", "scales"), ("scales",)

    def __post_init__(self):
        if self.group < 1:
            raise EfftuneError(f"int8 needs a group of at least 1 weight, not {self.group}; 64 is usual.")

    def store(self, weight: Tensor) -> Tensors:
        return int8_quantize(weight, self.group)

    def refuse(self, weight):
        refuse_infinite(weight)

    def dtype(self, tensors):
        return tensors[1].dtype

    def linear(self, w, z, low_rank=None, bias=None, add=None, entries=()):
        return linear(z, self._unpacked(w, z.dtype, entries), low_rank, bias, add)

    def linear_t(self, w, dy, low_rank=None, add=None, entries=()):
        return linear_t(dy, self._unpacked(w, dy.dtype, entries), low_rank, add)

    def rows(self, w, a, b, dtype):
        codes, scales = w.tensors
        return int8_dequantize(codes[a:b], scales[a:b], self.group, dtype)

    def weight_vjp(self, w, dw_rows, a, b):
        """d scale = Σ over the group of dW · code; the codes are integers and have none."""
        codes, scales = w.tensors
        n, k = dw_rows.shape
        groups = scales.shape[1]
        products = F.pad(
            dw_rows.to(torch.promote_types(dw_rows.dtype, torch.float32)) * codes[a:b], (0, groups * self.group - k)
        )
        return None, products.view(n, groups, self.group).sum(-1).to(scales.dtype)

    def _unpacked(self, w: Stored, dtype: torch.dtype, entries: SparseMatrix = ()) -> Tensor:
        codes, scales = w.tensors
        return add_entries(int8_dequantize(codes, scales, self.group, dtype), entries)
