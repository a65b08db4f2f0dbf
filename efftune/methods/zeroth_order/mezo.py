"""MeZO: gradients from two forward passes, at the memory of inference."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.methods.zeroth_order._estimate import ZerothOrder


@dataclass(frozen=True)
class Mezo(ZerothOrder):
    """Trains without a backward pass: two forward passes give the slope a of the loss along a random direction z, and
    the step goes along z. a = (L(θ + εz) − L(θ − εz)) / 2ε, then θ ← θ − lr·a·z, with z drawn again from the step's
    seed.

    Whatever else the recipe says trains is what is perturbed: all weights, adapters, or a part of the layers. The
    passes run in evaluation mode (no dropout), so that both signs see one function. Every layer is perturbed into a
    scratch copy as it is called and gets its own tensors back after it, so the weights are bit for bit what they were;
    the layers of a block are perturbed together where they are small. A weight that some module uses without calling
    the one that owns it is not perturbed there, unless the block that both are in is. The loss need not be
    differentiable.

    With gradient accumulation all micro-batches of a step share z, and their scalars add. A direction with a loss that
    is NaN or Inf is left out and counted; `efftune train` stops where no loss of a step is finite. With
    torch.distributed the processes exchange scalars only.

    Memory: the trained weights of the largest layer, which in a language model is mostly the head (501 MiB of 128,256 x
        2048 in bfloat16), or 16 MiB of several small ones.
    Cost: two forward passes (one with points=1), times `samples`.
    Numerics: a is computed in float64 from the losses, on their device; E[a·z] = ∇L + O(ε²).
    Source: Malladi et al. 2023, arXiv:2305.17333, algorithm 1 (ε = 1e-3, lr 1e-7..1e-6 for full weights).
    """

    name = "mezo"
