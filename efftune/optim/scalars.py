"""The scalars of a step's directions: from the losses of forward passes to what z is multiplied by."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor, distributed


class Scalars:
    """a / (√v + 1e-8) of the directions of each step, and what is remembered from step to step for them.

    Args:
        beta2: v is the running mean of a² with beta2 > 0, and absent (the a are as they are) otherwise.
    """

    KEPT = ("second", "seen", "previous", "directions", "skipped", "flat")  # in a state_dict of the optimizer

    def __init__(self, beta2: float):
        self.beta2 = beta2
        self.pending: dict[int, tuple[Tensor, frozenset[int]]] = {}  # seed -> scalar (), ids of what it is for
        self.applied: dict[int, Tensor] = {}  # seed -> scalar () of the last step, averaged over processes
        self.losses: dict[int, Tensor] = {}  # of this step's directions, and the mean of the last step's: for one point
        self.previous: Tensor | None = None
        self.second: Tensor | None = None  # v, not corrected for its start, and of how many steps
        self.seen: Tensor | None = None
        self.directions = 0  # so far, of which these:
        self.skipped = self.flat = torch.zeros((), dtype=torch.int64, device="cpu")

    def accumulate(self, seed: int, a: Tensor | float, used: Set[int]) -> None:
        """Adds a·z(seed) to the step's gradient for the parameters whose id is in `used`."""
        a = a.double() if isinstance(a, Tensor) else torch.tensor(a, dtype=torch.float64, device="cpu")
        if seed in self.pending:
            a, used = a + self.pending[seed][0], set(self.pending[seed][1] | used)
        self.pending[seed] = a, frozenset(used)

    def one_point_difference(self, index: int, loss: Tensor) -> Tensor:
        """The difference that an estimate with one point takes, of a micro-batch's `loss` () along the step's direction
        `index`. Over micro-batches it adds up to the step's loss minus the mean of the last step's losses, and to 0
        while there is none. The last losses do not depend on this step's directions, so the gradient has no bias."""
        first = index not in self.losses
        self.losses[index] = loss if first else self.losses[index] + loss
        if self.previous is None:
            return torch.zeros_like(loss)
        return loss - self.previous.to(loss.device) if first else loss

    def end_losses(self) -> None:
        """Makes the losses of this step those of the last step."""
        if self.losses:
            mean = torch.stack(list(self.losses.values())).mean()
            self.previous = mean if self.previous is None else torch.where(mean.isfinite(), mean, self.previous)
            self.losses.clear()

    def take(self) -> Tensor:
        """Returns a / √v (n,) float64 of the step's directions, averaged over processes, and 0 where that is not
        finite."""
        a = average(torch.stack([a for a, _ in self.pending.values()]))
        self.applied = dict(zip(self.pending, a.unbind(), strict=True))
        self.directions += len(a)
        for key in self.KEPT:  # of a checkpoint: where the losses are now
            if isinstance(value := getattr(self, key), Tensor):
                setattr(self, key, value.to(a.device))
        if not self.losses or self.previous is not None:  # the first look of one point has nothing to differ from
            self.flat = self.flat + (a == 0).sum()
        self.end_losses()
        finite = a.isfinite()
        self.skipped = self.skipped + (~finite).sum()
        a = torch.where(finite, a, 0.0)
        if self.beta2:
            second, seen = (a.new_zeros(()) if t is None else t for t in (self.second, self.seen))
            square, tells = a.square().sum() / finite.sum().clamp_min(1), a.any()  # nothing: skipped, or a first look
            self.second = torch.where(tells, (1 - self.beta2) * square + self.beta2 * second, second)
            self.seen = seen + tells
            a = a / ((self.second / (1 - self.beta2 ** self.seen.clamp_min(1))).sqrt() + 1e-8)
        return a


def average(a: Tensor) -> Tensor:
    """Returns the mean of a over the processes of torch.distributed, if there are any. They exchange nothing else."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return a
    a = a.clone()
    distributed.all_reduce(a)
    return a / distributed.get_world_size()
