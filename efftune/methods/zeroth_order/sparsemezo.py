"""Sparse-MeZO: only small weights are perturbed and trained."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.methods.zeroth_order._estimate import ZerothOrder


@dataclass(frozen=True)
class SparseMezo(ZerothOrder):
    """MeZO on θ_i with |θ_i| ≤ h only: z_i = 0 for the `sparsity` largest entries of each tensor.

    h is a tensor's quantile 1 − sparsity before the first step, and stays. The mask is made anew from the clean weights
    wherever z is drawn, in the kernel, so it costs no memory and is the same for both signs and the update; an entry
    that grows beyond h stops training. A tensor that begins at zero (LoRA's B, biases) trains whole. E[a·z] = ∇L +
    O(ε²) on the entries that are small, 0 on the others.
    Memory and cost: those of mezo, and a k-th value of each tensor once.
    Raises: EfftuneError for a sparsity outside (0, 1).
    Source: Liu et al. 2024, arXiv:2402.15751; its code takes the mask from perturbed weights, which flips entries.
    """

    sparsity: float = 0.75

    name = "sparsemezo"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise EfftuneError(f"sparsemezo leaves out a share of each tensor between 0 and 1, not {self.sparsity}.")
