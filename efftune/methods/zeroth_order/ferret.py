"""Ferret: first-order steps whose outcome is projected on shared random directions, so that scalars say it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.methods._base import Method, State
from efftune.methods.zeroth_order._estimate import ZerothOrder
from efftune.optim import projection
from efftune.optim.directions import stream_of
from efftune.optim.scalars import average
from efftune.optim.seed_log import DECAY, SeedLog, fingerprint


@dataclass
class Round(State):
    """What a run knows beside its weights."""

    log: SeedLog | None = field(default_factory=SeedLog)  # None: it would have been longer than the weights
    base: str = ""  # fingerprint of the model before the first step
    anchor: dict[str, Tensor] = field(default_factory=dict)  # the trained weights at the round's start
    moved: set[str] = field(default_factory=set)  # names of those that a step of the round may have changed
    first: bool = False  # no forward pass yet since the optimizer was made

    def state_dict(self):
        anchor = self.anchor if self.moved else {}  # at a round's start it is the weights
        log = None if self.log is None else self.log.state_dict()
        return {"log": log, "base": self.base, "anchor": dict(anchor), "moved": sorted(self.moved)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.base, self.moved, self.first = state["base"], set(state["moved"]), False
        self.anchor = {name: w.to(device) for name, w in state["anchor"].items()}
        self.log, log = None, state["log"]
        if log is not None:
            self.log = SeedLog()
            self.log.load_state_dict(log)


@dataclass(frozen=True)
class Ferret(Method):
    """Lets the recipe's optimizer take rounds of `local_steps` steps from w₀ to w, and then writes w ← w₀ + Δ̃, where
    Δ̃ is what a few numbers say of Δ = w − w₀. Those numbers are all that processes and clients exchange.

    A block b of `block` consecutive entries of a tensor has k random directions z_i, drawn from the round's seeds,
    which follow from `seed`:

        a_i = scale/k · <z_i, Δ_b>,    Δ̃_b = Σ_i a_i z_i,    E Δ̃ = scale · Δ,

    for scale=1 with E‖Δ̃_b − Δ_b‖² = (block ∓ 1)/k · ‖Δ_b‖², − for ±1 ("rademacher"), + for "normal". The a_i, in
    float32, are all that a round takes: processes of torch.distributed exchange nothing else and apply their mean, a
    federated client sends them (examples/federated.py), and the seed log holds them.

    `k` and `block`: the error and the count of numbers depend on block/k alone, and the work on k, so that large blocks
    with many directions gain nothing over small ones with few. So tensors get numbers by their size. That makes the sum
    of errors least where all entries move about as far (under Adam), and nothing need be sent to agree on it.

    `scale`: Δ̃ is about scale·√(block/k) times as long as Δ, which does harm only where the loss is curved. So the scale
    of the least error, k/(k + block ∓ 1), is far too careful, and 1 is too bold for a large block/k or rate. Held-out
    loss of the small default model, 6.26 before, after 120 steps (docs/benchmarks.md has the command):

        recipe   --lr   without   ferret   scale=1.0   scale=0.2   scale=0.06, the least error's
        full     1e-3   4.782     5.013    4.825                   5.896
        lora     8e-3   5.361     5.475    5.976       5.718

    The local steps are those of the recipe's optimizer, whose state goes on from round to round. A tensor that rests
    for a whole round (lisa) sends nothing and stays as it is. Between the ends of rounds the weights are the local
    ones. A round that the end of training cuts stays so and is in no log, so let the steps be a multiple of
    local_steps.

    Memory: w₀, one copy of the trained weights, and scratch of a tensor's size.
    Cost: 2k draws for a weight and round.
    Numerics: Δ and the products are float32 (float64 for float64); 16-bit weights are rounded stochastically.
    State in a checkpoint: within a round w₀, and the log, four bytes a number, which ends when it is longer than the
        trained weights. Buffers (running statistics of BatchNorm) are not in the log.
    Raises: EfftuneError for k outside [1, block], local_steps below 1, a scale not above 0, an unknown dist, and beside
        a method whose run is scalars already (mezo).
    Source: Shu et al. 2024, arXiv:2409.06277. Its code draws truncated normals for blocks of a tensor or several,
        spreads K by ‖Δ‖ over them, clips, and has a server's learning rate for scale.
    """

    k: int = 4
    block: int = 64
    local_steps: int = 10
    dist: str = "rademacher"
    scale: float = 0.5
    seed: int = 0

    name = "ferret"
    State = Round

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

    def seeds(self, turn: int) -> list[int]:
        """The k seeds that all share in round 0, 1, 2, ..."""
        return random.Random(f"{self.seed}:{turn}").sample(range(DECAY), self.k)

    def before_step(self, run):
        model, step, optimizer, now = run.model, run.step, run.optimizer, cast(Round, run.state(self))
        if step == 0:  # a run begins, whatever came before
            vars(now).update(vars(Round(base=fingerprint(model), first=True)))
        if step % self.local_steps == 0 or not now.anchor:
            now.moved.clear()
            now.anchor.clear()  # first: the memory is taken once
            for name, p in registered(model, optimizer):
                now.anchor[name] = p.detach().clone(memory_format=torch.contiguous_format)

    def backward(self, micro, inner):
        self._look_again(micro.model, micro.run.state(self))
        return inner(micro)

    @torch.no_grad()
    def _look_again(self, model: nn.Module, now: Round) -> None:
        """Weights may have been loaded since the optimizer was made."""
        if now.first and (base := fingerprint(model)) != now.base:
            now.base, named = base, dict(model.named_parameters())
            for name, anchor in now.anchor.items():
                anchor.copy_(named[name])
        now.first = False

    @torch.no_grad()
    def after_step(self, run):
        model, step, optimizer, now = run.model, run.step, run.optimizer, cast(Round, run.state(self))
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

    def count(self, w: Tensor) -> int:
        """How many numbers a round sends of a tensor."""
        return projection.count(w.numel(), self.k, self.block)

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

    def arrives(self, name, change, turn):
        """What becomes of the change, without `scale`, which acts like a learning rate."""
        zero, seeds = torch.zeros_like(change), self.seeds(turn)
        return self.reconstruct(name, zero, self.project(name, change, zero, seeds) / self.scale, seeds)

    @torch.no_grad()
    def replay(self, model: nn.Module, log: SeedLog) -> None:
        """Does to the parameters what the run did that wrote `log`: bit for bit on the same kind of device, and on any
        with ±1 and float32 weights."""
        named = dict(model.named_parameters())
        for step, numbers in log.rounds():
            seeds = self.seeds(step // self.local_steps)
            for name, a in numbers.items():
                self.reconstruct(name, named[name], torch.tensor(a), seeds, out=named[name])

    def report(self, run):
        trained = [p for p in run.model.parameters() if p.requires_grad]
        numbers, weights = sum(map(self.count, trained)), sum(p.numel() for p in trained)
        return f"ferret: {numbers:,} numbers a round of {self.local_steps} steps, for {weights:,} weights"


def registered(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that the optimizer may change, in the model's order."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return ((name, p) for name, p in model.named_parameters() if id(p) in mine)
