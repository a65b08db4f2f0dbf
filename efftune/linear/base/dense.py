"""Dense: W is an ordinary (N, K) tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from efftune.linear.contracts import Base, Stored, Tensors, plus_entries, plus_entries_t
from efftune.ops.lowrank_linear import linear, linear_t

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with W stored as (K, N)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_matrix(weight: Tensor) -> bool:
    """Whether `Dense` can store the weight: two dimensions, strided, of a dtype in FLOATS."""
    return weight.dtype in FLOATS and weight.layout == torch.strided and weight.ndim == 2


@dataclass(frozen=True)
class Dense(Base):
    """W as it is, in float32, bfloat16, float16 or float64. `weight` is the state_dict's name, as in nn.Linear.

    Args:
        transposed: stored as (K, N), as GPT-2's Conv1D has it.
    Numerics: one product with f32 accumulation, rounded to x.dtype; a weight of another dtype than x (autocast) is
        rounded to x.dtype first. With a low-rank term see `ops.lowrank_linear`; entries are added to what was rounded,
        and the sum is rounded.
    """

    transposed: bool = False

    names = learns = ("weight",)
    trains = True

    def store(self, weight: Tensor) -> Tensors:
        return (weight.t().contiguous() if self.transposed else weight,)

    def adopt(self, module):
        if not (is_conv1d(module) if self.transposed else isinstance(module, nn.Linear)):
            return None
        weight = cast(Tensor, module.weight)
        if not is_matrix(weight):
            return None  # a subclass with codes in it, or a plain one in float8, of complex numbers, sparse
        n, k = weight.shape[::-1] if self.transposed else weight.shape
        return Stored((weight,), (n, k), weight.dtype)

    def dtype(self, tensors):
        return tensors[0].dtype

    def linear(self, w, z, low_rank=None, bias=None, add=None, entries=()):
        y = linear(z, self._matrix(w, z.dtype), low_rank, bias, add)
        return plus_entries(y, z, entries) if entries else y

    def linear_t(self, w, dy, low_rank=None, add=None, entries=()):
        dx = linear_t(dy, self._matrix(w, dy.dtype), low_rank, add)
        return plus_entries_t(dx, dy, entries) if entries else dx

    def rows(self, w, a, b, dtype):
        weight = w.tensors[0]
        return (weight[:, a:b].t() if self.transposed else weight[a:b]).to(dtype)

    def put(self, w, index, values):
        (n, k), weight = w.shape, w.tensors[0].data  # .data: a graph that saved W must not see a change of its version
        if self.transposed:
            index = index % k * n + index // k
        weight.put_(index.long(), values.to(weight.dtype))

    def weight_vjp(self, w, dw_rows, a, b):
        return (dw_rows.t() if self.transposed else dw_rows,)

    def _matrix(self, w: Stored, dtype: torch.dtype) -> Tensor:
        """(N, K)."""
        weight = w.tensors[0]
        if weight.dtype != dtype:
            weight = weight.to(dtype)  # under autocast
        return weight.t() if self.transposed else weight
