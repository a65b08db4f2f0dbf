"""MeZO: gradients from two forward passes, at the memory of inference."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from efftune.errors import EfftuneError
from efftune.methods._base import Method
from efftune.modes import evaluation_mode
from efftune.ops.perturb import perturb
from efftune.optim.zeroth_order import ZerothOrderSGD, stream_of


@dataclass(frozen=True)
class Mezo(Method):
    """a = (L(θ + εz) − L(θ − εz)) / 2ε, then θ ← θ − lr·a·z, with z regenerated from the step's seed.

    Whatever else the recipe says trains is what is perturbed. Runs in evaluation mode (no dropout), so that both signs
    see one function. Every layer is perturbed into a scratch copy as it is called and gets its own tensors back after
    it, so the weights are bit for bit what they were. A weight that some module uses without calling the one that owns
    it is not perturbed there. Gradient accumulation: all micro-batches of a step share z, and their scalars add.
    Memory: one layer's trained weights. Cost: two forward passes.
    Numerics: a in float64 from the two losses; E[a·z] = ∇L + O(ε²).
    Source: Malladi et al. 2023, arXiv:2305.17333, algorithm 1 (ε = 1e-3, lr 1e-7..1e-6 for full weights).
    """

    eps: float = 1e-3
    dist: str = "normal"
    seed: int = 0

    name = "mezo"

    def __post_init__(self):
        if not self.eps > 0:
            raise EfftuneError(f"mezo needs eps > 0, not {self.eps}; 1e-3 is usual.")
        if self.dist not in ("normal", "rademacher"):
            raise EfftuneError(f"mezo's dist is 'normal' or 'rademacher', not {self.dist!r}.")

    def optimizer(self, groups, **defaults):
        return ZerothOrderSGD(groups, dist=self.dist, **defaults)

    @torch.no_grad()
    def backward(self, model, batch, loss_fn, scale, step, optimizer):
        if not isinstance(optimizer, ZerothOrderSGD):
            raise EfftuneError("mezo has no gradient tensors to give; make the optimizer with tuner.optimizer(lr=...).")
        seed = random.Random(f"{self.seed}:{step}").getrandbits(62)
        losses = []
        for eps in (self.eps, -self.eps):
            with evaluation_mode(model), perturbed(model, optimizer, eps, seed, self.dist) as seen:
                losses.append(loss_fn(model, batch).detach())
        if step == 0:
            unseen = [n for n, p in optimizer.named_parameters() if p.requires_grad and id(p) not in seen]
            if unseen:
                warnings.warn(
                    f"mezo: no module's forward used {', '.join(unseen[:5])}; they are not trained.", stacklevel=2
                )
        a = (losses[0].double() - losses[1].double()).item() / (2 * self.eps)
        loss = (losses[0] + losses[1]) / 2
        if math.isfinite(a):  # else the loss that is returned says so and nothing is applied
            optimizer.accumulate(seed, a * scale, seen)
        return loss


@contextmanager
def perturbed(model: nn.Module, optimizer: ZerothOrderSGD, eps: float, seed: int, dist: str) -> Iterator[set[int]]:
    """Within the block every module computes with w + eps·z for those of its own parameters that train. Yields the set
    of ids of the parameters that were used so."""
    names = {id(p): name for name, p in optimizer.named_parameters() if p.requires_grad}
    stack: list[list[tuple[nn.Parameter, torch.Tensor]]] = []  # clean tensors of the calls under way, innermost last
    dirty: set[int] = set()  # a parameter that nested modules share is perturbed by the outermost alone
    seen: set[int] = set()

    def enter(module: nn.Module, args) -> None:
        stack.append([])
        for parameter in module.parameters(recurse=False):
            name = names.get(id(parameter))
            if name is not None and id(parameter) not in dirty:
                stack[-1].append((parameter, parameter.data))
                parameter.data = perturb(parameter.data, eps, seed=seed, stream=stream_of(name), dist=dist)
                dirty.add(id(parameter))
                seen.add(id(parameter))

    def leave(module: nn.Module, args, output) -> None:
        for parameter, data in stack.pop():
            parameter.data = data
            dirty.remove(id(parameter))

    handles = []
    for module in model.modules():
        if any(id(p) in names for p in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
