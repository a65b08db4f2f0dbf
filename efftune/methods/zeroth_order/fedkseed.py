"""FedKSeed: all directions come from K shared seeds, so that a run is K numbers, however long it was."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.methods.zeroth_order._estimate import Exactly, ZerothOrder
from efftune.optim.seed_log import DECAY


@functools.cache
def candidates(seed: int, k: int) -> tuple[int, ...]:
    """The K seeds that all who know `seed` share."""
    draw = random.Random(f"{seed}:candidates")
    return tuple(draw.sample(range(DECAY), k))


@dataclass
class Known(Exactly):
    """Sums and counts of |a| by seed, in the order of `candidates`."""

    sum: Tensor | None = None  # (k,) float64
    count: Tensor | None = None  # (k,) float64
    p: list[float] = field(default_factory=list)  # (k,), taken `at` this step
    at: int = -1


@dataclass(frozen=True)
class FedKSeed(ZerothOrder):
    """Trains as mezo does, with directions from `k` shared seeds only: θ − θ₀ = Σ_k c_k · z(seed_k), and the c_k are
    all that a client sends, or that a seed log sums up to (`SeedLog.sums`).

    With pro=True a seed is drawn with probability p_k, the softmax of its mean |a|, min-max scaled over the seeds (a
    seed that was not drawn yet counts with the mean of the others), taken anew every `interval` steps. So directions in
    which the loss is steep come more often. The update is then that of another expectation, Σ p_k a_k z_k;
    unbiased=True weights a by 1/(k·p_k) and has the expectation of uniform draws.

    Memory: that of mezo, and with pro two numbers a seed.
    Cost: that of mezo. Replaying the sums draws k numbers for each weight, and reads it once (`perturb` with many
        seeds).
    State in a checkpoint: sums and counts of |a| (pro).
    Raises: EfftuneError for k or interval below 1, and for unbiased without pro, which has nothing to correct.
    Source: Qin et al. 2024, arXiv:2312.06353 (K = 4096), section 3.4 for pro.
    """

    k: int = 4096
    pro: bool = False
    unbiased: bool = False
    interval: int = 100

    name = "fedkseed"
    State = Known

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1 or self.interval < 1:
            raise EfftuneError(f"fedkseed needs k and interval of at least 1, not {self.k} and {self.interval}.")
        if self.unbiased and not self.pro:
            raise EfftuneError("fedkseed draws its seeds uniformly and is unbiased; unbiased=True belongs to pro=True.")

    def directions(self, run):
        draw, seeds = random.Random(f"{self.seed}:{run.step}"), candidates(self.seed, self.k)
        if not self.pro:
            return [(draw.choice(seeds), 1.0) for _ in range(self.samples)]
        p = self._probabilities(run.state(self), run.step)
        chosen = draw.choices(range(self.k), weights=p, k=self.samples)
        return [(seeds[i], 1 / (self.k * p[i]) if self.unbiased else 1.0) for i in chosen]

    def _probabilities(self, known: Known, step: int) -> list[float]:
        if not known.p or step % self.interval == 0 and known.at != step:
            known.p, known.at = significance(known.sum, known.count, self.k), step
        return known.p

    def after_step(self, run):
        if not self.pro:
            return
        seeds, known, weights = candidates(self.seed, self.k), run.state(self), self.weights(run)
        for seed, a in run.optimizer.scalars.applied.items():
            if known.sum is None:
                known.sum, known.count = torch.zeros(2, self.k, dtype=torch.float64, device=a.device)
            known.sum[seeds.index(seed)] += torch.where(a.isfinite(), a.abs() / weights[seed], 0.0)
            known.count[seeds.index(seed)] += a.isfinite()


def significance(total: Tensor | None, count: Tensor | None, k: int) -> list[float]:
    """The probabilities p (k,) of the seeds, from the sum and the count of |a| of each; they are uniform while nothing
    is known. This waits for the device."""
    if total is None or count is None or not bool(count.any()):
        return [1 / k] * k
    mean = total / count.clamp_min(1)
    mean = torch.where(count > 0, mean, mean[count > 0].mean())
    low, high = mean.min(), mean.max()
    scaled = torch.where(high > low, (mean - low) / (high - low), torch.zeros_like(mean))
    return scaled.softmax(0).tolist()
