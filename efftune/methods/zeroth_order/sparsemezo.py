"""Sparse-MeZO: only small weights are perturbed and trained."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.methods.zeroth_order._estimate import ZerothOrder


@dataclass(frozen=True)
class SparseMezo(ZerothOrder):
    """Perturbs and trains, as mezo does, only the small entries θ_i of each tensor, those with |θ_i| ≤ h: z_i = 0 for
    the share `sparsity` of its entries that is largest.

    h is a tensor's quantile 1 − sparsity before the first step, and stays. The mask is made anew from the clean weights
    wherever z is drawn, in the kernel, so it costs no memory and is the same for both signs and the update. An entry
    that grows beyond h stops training. A tensor that begins at zero (LoRA's B, biases) trains whole. E[a·z] = ∇L +
    O(ε²) on the entries that are small, and 0 on the others.

    Memory and cost: those of mezo, and once a k-th value of each tensor.
    Raises: EfftuneError for a sparsity outside (0, 1).
    Source: Liu et al. 2024, arXiv:2402.15751; its code takes the mask from perturbed weights, which flips entries.
    """

    sparsity: float = 0.75

    name = "sparsemezo"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise EfftuneError(f"sparsemezo leaves out a share of each tensor between 0 and 1, not {self.sparsity}.")
