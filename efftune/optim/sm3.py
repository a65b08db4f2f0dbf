"""SM3: adaptive steps whose state is a number for each row and each column."""

from __future__ import annotations

from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.optim.contract import Optimizer, uncast


class SM3(Optimizer):
    """ν = min(row, column) + g²;   p ← (1 − lr·weight_decay)·p − lr·g/√ν;   row, column ← the largest ν of each

    Adagrad's sums of squares, of which only a bound for each row and each column is kept. A tensor of d dimensions has
    d of them, one of one dimension the sums themselves. Where a few entries of a matrix are a parameter of their own
    (`cover`), the rows and columns are those of the matrix: the largest ν is over the entries that train, and a row
    without any keeps what it had, so that N + K numbers last however often others train.

    Args:
        lr: learning rate.   weight_decay: decoupled.
        momentum: in [0, 1); above 0 a running mean of g/√ν takes the place of g/√ν, for one number more an entry.
    Numerics: float32 (float64 for such parameters), p rounded once; 0/√0 is 0.
    State: `bound_0`, `bound_1`, ...: (n_i,) for each dimension, and (N,), (K,) of a matrix by a few of its entries;
        `momentum_buffer`, of p's shape, with momentum.
    Raises: EfftuneError for momentum out of range.
    Source: Anil et al. 2019, arXiv:1901.11150, algorithm SM3-II.
    """

    def __init__(self, params, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        if not 0 <= momentum < 1:
            raise EfftuneError(f"momentum lies in [0, 1), and is not {momentum}.")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.covers: dict[nn.Parameter, tuple[Tensor, tuple[int, int]]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "covers"):  # a copy: who made it says again what it covers
            self.covers = {}

    def cover(self, p: nn.Parameter, indices: Tensor, shape: tuple[int, int]) -> None:
        """Says that p (S,) are the entries n·K + k = indices (S,) of an (N, K) matrix, as they are at each step."""
        self.covers[p] = indices, shape

    def bounds(self, p: nn.Parameter) -> list[Tensor] | None:
        """The numbers of p's rows, columns, ..., or None before its first step."""
        state = self.state.get(p)
        return [state[f"bound_{i}"] for i in range(len(self._sizes(p)))] if state else None

    def _sizes(self, p: nn.Parameter) -> tuple[int, ...]:
        return self.covers[p][1] if p in self.covers else (*p.shape,) or (1,)

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._update(p, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _update(self, p: nn.Parameter, lr: float, momentum: float, weight_decay: float) -> None:
        dtype, state = torch.promote_types(p.dtype, torch.float32), self.state[p]
        g = cast(Tensor, p.grad).to(dtype).reshape(p.shape or (1,))
        for i, size in enumerate(self._sizes(p)):
            if f"bound_{i}" not in state:
                state[f"bound_{i}"] = torch.zeros(size, dtype=dtype, device=p.device)
        bounds = self.bounds(p) or []
        if p in self.covers:
            indices, (_, k) = self.covers[p]
            places = [indices.long() // k, indices.long() % k]
            v = torch.minimum(*[bound[at] for bound, at in zip(bounds, places, strict=True)]).addcmul_(g, g)
            for bound, at in zip(bounds, places, strict=True):
                bound.scatter_reduce_(0, at, v, "amax", include_self=False)
        else:
            one = [1] * g.ndim
            v = reduce(torch.minimum, [b.view(*one[:i], -1, *one[i + 1 :]) for i, b in enumerate(bounds)]) + g * g
            for i, bound in enumerate(bounds):
                bound.copy_(v.movedim(i, 0).reshape(len(bound), -1).amax(1))
        update = torch.where(v > 0, g * v.rsqrt(), 0)
        if momentum:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
            update = state["momentum_buffer"].mul_(momentum).add_(update.view(p.shape), alpha=1 - momentum)
        p.copy_(p.to(dtype) * (1 - lr * weight_decay) - lr * update.view(p.shape))

    def move(self, p, index, before):
        """Bounds are those of rows and columns, whichever entries train; the momentum follows its entries, and is 0 for
        new ones."""
        state = self.state.get(p, {})
        if p not in self.covers:
            super().move(p, index, before)
        elif "momentum_buffer" in state:
            held = state["momentum_buffer"] if before else state["momentum_buffer"].new_zeros(1)
            state["momentum_buffer"] = torch.where(index >= 0, held[index.clamp(min=0)], held.new_zeros(()))

    def fits(self, p, name, value):
        if name.startswith("bound_"):
            sizes, place = self._sizes(p), int(name.removeprefix("bound_"))
            return place < len(sizes) and value.shape == (sizes[place],)
        return super().fits(p, name, value)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        uncast(self, state_dict)
