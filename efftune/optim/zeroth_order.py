"""SGD along random directions that are never stored: a seed and a scalar stand for a gradient."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.ops.perturb import perturb_


def stream_of(name: str) -> int:
    """The random stream of a parameter: from its name, never from its position in a list."""
    return zlib.crc32(name.encode())


class ZerothOrderSGD(torch.optim.Optimizer):
    """w ← w − lr · (Σ_i a_i · z(seed_i) + weight_decay · w), z drawn again from its seed, no buffer of w's size.

    Args:
        params: groups of ("name", parameter) pairs: the name picks the random stream.
        lr: learning rate.   weight_decay: decoupled.   dist: "normal" or "rademacher", as the gradients were estimated.
    Numerics: w − lr·a·z in float32; bfloat16 and float16 weights are rounded stochastically: lr·a·z is mostly below
        half a unit in the last place, and rounding to nearest would drop it.
    State: none. `accumulate` collects the scalars of a step; `step` applies and forgets them.
    Source: Malladi et al. 2023, arXiv:2305.17333, algorithm 1.
    """

    def __init__(self, params, lr: float = 1e-6, weight_decay: float = 0.0, dist: str = "normal"):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, dist=dist))
        if any("param_names" not in group for group in self.param_groups):
            raise EfftuneError("ZerothOrderSGD draws by parameter name: give it (name, parameter) pairs.")
        self.pending: list[tuple[int, float, set[int]]] = []

    def named_parameters(self):
        for group in self.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    def accumulate(self, seed: int, a: float, seen: set[int]) -> None:
        """Adds a·z(seed) to the step's gradient for the parameters whose id is in `seen`."""
        self.pending.append((seed, a, seen))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.pending.clear()

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.pending and any(p.grad is not None for _, p in self.named_parameters()):
            raise EfftuneError(
                "ZerothOrderSGD takes its gradients from tuner.backward(batch, loss_fn), not loss.backward()."
            )
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if group["weight_decay"] and any(id(parameter) in seen for _, _, seen in self.pending):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                for seed, a, seen in self.pending:
                    if id(parameter) in seen:
                        perturb_(
                            parameter, -group["lr"] * a, seed=seed, stream=stream_of(name),
                            dist=group["dist"], rounding="stochastic",
                        )  # fmt: skip
        self.pending.clear()
        return loss
