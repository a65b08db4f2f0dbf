"""What a recipe and a training loop ask of an optimizer beyond what torch's have.

An optimizer that answers otherwise than the defaults derives from `Optimizer`; of any other the defaults hold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Optimizer(torch.optim.Optimizer):
    """An optimizer that answers otherwise than torch's do."""

    in_backward: bool = False  # takes each gradient as soon as backward has it: none is left when `step` is called
    clips: bool = False  # limits gradients itself, to `max_norm`
    max_norm: float = 0.0  # 0: no limit

    def begin(self, last: bool) -> None:
        """Called before the backward pass of each micro-batch, of an optimizer that works `in_backward`. `last`: no
        other micro-batch of the step follows, so that the gradients it sees are the step's."""

    def move(self, p: nn.Parameter, index: Tensor) -> None:
        """Lets the state of p follow its entries, which are others now: entry i of the new order is the one that was at
        index[i], or a new one where index[i] < 0. State that has an entry for each of p's follows; its new entries are
        0.

        Args:
            p: (n,) as it is now.   index: (n,) int64.
        """
        move_state(self, p, index)


def move_state(optimizer: torch.optim.Optimizer, p: nn.Parameter, index: Tensor) -> None:
    """Moves the state of any optimizer that has an entry for each of p's in 1-d tensors, as all of torch's have."""
    known, before = index >= 0, index.clamp(min=0)
    for name, value in optimizer.state.get(p, {}).items():
        if isinstance(value, Tensor) and value.ndim == 1:
            optimizer.state[p][name] = torch.where(known, value[before], value.new_zeros(()))


def move(optimizer: torch.optim.Optimizer, p: nn.Parameter, index: Tensor) -> None:
    """Lets the state of `p` follow its entries, in whatever optimizer; see `Optimizer.move`."""
    if isinstance(optimizer, Optimizer):
        optimizer.move(p, index)
    else:
        move_state(optimizer, p, index)
