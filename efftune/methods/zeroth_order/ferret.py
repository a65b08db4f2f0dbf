"""Ferret: first-order steps whose outcome is projected on shared random directions, so that scalars say it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.methods._base import Method
from efftune.methods.zeroth_order._estimate import ZerothOrder
from efftune.optim import projection
from efftune.optim.seed_log import DECAY, SeedLog, fingerprint
from efftune.optim.zeroth_order import average, stream_of


@dataclass
class Round:
    """What a run knows beside its weights; on the model."""

    log: SeedLog | None = field(default_factory=SeedLog)  # None: it would have been longer than the weights
    base: str = ""  # fingerprint of the model before the first step
    anchor: dict[str, Tensor] = field(default_factory=dict)  # the trained weights at the round's start
    moved: set[str] = field(default_factory=set)  # names of those that a step of the round may have changed


@dataclass(frozen=True)
class Ferret(Method):
    """TODO"""

    k: int = 4
    block: int = 64
    local_steps: int = 10
    dist: str = "rademacher"
    scale: float = 0.5
    seed: int = 0

    name = "ferret"

    def __post_init__(self):
        if self.local_steps < 1:
            raise EfftuneError(f"ferret projects after at least 1 local step, not {self.local_steps}.")
        if not 1 <= self.k <= self.block:
            raise EfftuneError(
                f"ferret sends 1 to {self.block} numbers for a block of {self.block} weights, not k={self.k}; a k "
                "far below block makes them few."
            )
        if self.dist not in ("normal", "rademacher"):
            raise EfftuneError(f"ferret's dist is 'normal' or 'rademacher', not {self.dist!r}.")
        if not self.scale > 0:
            raise EfftuneError(f"ferret's scale is above 0, not {self.scale}; 1 is unbiased.")

    def why_not(self, others):
        rival = next((other for other in others if isinstance(other, ZerothOrder | Ferret)), None)
        if rival is None:
            return None
        return f"a run is sent as scalars by {rival.name} or by ferret, not both; leave one of them out"

    def seeds(self, round: int) -> list[int]:
        """The k seeds that all share in a round."""
        return random.Random(f"{self.seed}:{round}").sample(range(DECAY), self.k)

    def before_step(self, model, step, optimizer):
        now: Round = vars(model).setdefault("ferret", Round())
        if step == 0:
            now.base = fingerprint(model)
        if step % self.local_steps == 0 or not now.anchor:
            now.moved.clear()
            now.anchor.clear()  # first: the memory is taken once
            for name, p in registered(model, optimizer):
                now.anchor[name] = p.detach().clone(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def after_step(self, model, step, optimizer):
        now: Round = vars(model)["ferret"]
        now.moved |= {name for name, p in registered(model, optimizer) if p.requires_grad}  # the others rest
        if (step + 1) % self.local_steps:
            return
        seeds = self.seeds(step // self.local_steps)
        moved = {name: p for name, p in registered(model, optimizer) if name in now.moved}
        found = [self.project(name, p, now.anchor[name], seeds) for name, p in moved.items()]
        if not found:
            return
        mean = average(torch.cat([a.to(found[0].device) for a in found]))
        numbers = dict(zip(moved, mean.split([len(a) for a in found]), strict=True))
        for name, p in moved.items():
            self.reconstruct(name, now.anchor[name], numbers[name], seeds, out=p)
        if now.log is not None:
            now.log.append_round(step, numbers)
            if now.log.count * 4 > sum(w.numel() * w.element_size() for w in now.anchor.values()):
                now.log = None

    def project(self, name: str, w: Tensor, anchor: Tensor, seeds: Sequence[int]) -> Tensor:
        """(numbers,) float32: what is sent of w − anchor, for the parameter `name`."""
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        change = w.detach().to(dtype) - anchor.to(dtype)
        return projection.project(
            change, seeds, stream=stream_of(name), block=self.block, dist=self.dist, scale=self.scale
        )

    def reconstruct(
        self, name: str, anchor: Tensor, a: Tensor, seeds: Sequence[int], out: Tensor | None = None
    ) -> Tensor:
        """The weights that the numbers make of the anchor; in place with out=anchor."""
        return projection.reconstruct(
            anchor, a, seeds, stream=stream_of(name), block=self.block, dist=self.dist, out=out
        )

    @torch.no_grad()
    def replay(self, model: nn.Module, log: SeedLog) -> None:
        """Does to the parameters what the run did that wrote `log`: bit for bit on the same kind of device, and on any
        with ±1 and float32 weights."""
        named = dict(model.named_parameters())
        for step, numbers in log.rounds():
            seeds = self.seeds(step // self.local_steps)
            for name, a in numbers.items():
                self.reconstruct(name, named[name], torch.tensor(a), seeds, out=named[name])

    def remove(self, model):
        vars(model).pop("ferret", None)

    def report(self, model):
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        numbers = sum(projection.count(entries, self.k, self.block) for entries in trained)
        return f"ferret: {numbers:,} numbers a round of {self.local_steps} steps, for {sum(trained):,} weights"

    def state_dict(self, model):
        now: Round = vars(model).get("ferret", Round())
        anchor = now.anchor if now.moved else {}  # at a round's start it is the weights
        log = None if now.log is None else now.log.state_dict()
        return {"log": log, "base": now.base, "anchor": dict(anchor), "moved": sorted(now.moved)}

    def load_state_dict(self, model, state):
        device = {name: p.device for name, p in model.named_parameters()}
        now = vars(model)["ferret"] = Round(base=state["base"], moved=set(state["moved"]))
        now.anchor = {name: w.to(device[name]) for name, w in state["anchor"].items()}
        if state["log"] is None:
            now.log = None
        else:
            cast(SeedLog, now.log).load_state_dict(state["log"])


def registered(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that the optimizer may change, in the model's order."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return ((name, p) for name, p in model.named_parameters() if id(p) in mine)
