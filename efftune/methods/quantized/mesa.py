"""Mesa: backward keeps 8- or 4-bit codes of activations."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.linear import Exact
from efftune.linear.contracts import Keep
from efftune.linear.keep.quantized import Quantized
from efftune.methods._base import KEEPS, Method, Micro, Run, State, drawing_keeps, exact_keeps
from efftune.methods._gradients import discarding, distance, sampled_gradients
from efftune.nn.subbatch import statistics_kept
from efftune.plan import ALL_LINEAR
from efftune.random_state import generators, replaying

EXACT = 0  # as a number of bits
ROUNDS, DRAWS = 6, 3  # of choosing, and of gradients to check a choice by
MARGIN = 0.95  # of max_error may be used up: what checks it is itself a sample


Places = dict[str, list[Any]]  # name -> modules whose `keep` is chosen together


@dataclass
class Chosen(State):
    """The bits that `max_error` has chosen for the places."""

    bits: dict[str, int] | None = None  # place -> 4, 8 or EXACT; None: not measured yet
    error: float = 0.0
    _places: Places = field(default_factory=dict)  # once found: those that are kept exactly are not told any more
    _idle: bool = False  # within `exactly`: measures nothing


@dataclass(frozen=True)
class Mesa(Method):
    """Keeps 8- or 4-bit codes for backward in the place of activations: of the inputs of the trained linear layers that
    `target_modules` selects, and of the inputs of norms, activations and attention in the blocks around them.

    Values are quantised in groups, with stochastic rounding. Given dy, a linear layer's gradient stays unbiased, unless
    its input is an activation that is made again from codes. There, and through norms, activations and attention,
    gradients have a bias of second order in the rounding error. `efftune verify` measures it.

    With `max_error` not everything has `bits`. The first micro-batch that goes through `tuner.backward` tells how much
    error each place (the norms, activations, attention or linear layers of one block) puts into the gradient of each
    block. Places are then given 8 bits, or are kept exactly, most error per byte first, until

        √(E‖g − g*‖² / ‖g*‖²) ≤ max_error    over the parameters of every block

    and three draws with everything together confirm it. g* is the gradient with 8-bit keeps, whose own error is 17
    times smaller than that of 4 bits. With bits=8, or with a max_error that small, g* is the gradient with exact keeps,
    and the first micro-batch needs memory for them. Blocks that a schedule trains later only are not looked at.

    Memory: bits/8 + 4/group bytes for each value instead of 2 or 4.
    Cost of max_error: once, a forward and backward pass for each place, about four places a block. Their gradients are
        dropped, but hooks on parameters see them.
    Raises: EfftuneError for other bits than 8 and 4, for a max_error that is not positive, and where no layer trains.
    Source: Pan et al. 2021, arXiv:2111.11124.
    """

    bits: int = 8
    group: int = 64
    max_error: float | None = None
    target_modules: str | tuple[str, ...] = ALL_LINEAR

    name = "mesa"
    phase = KEEPS
    State = Chosen

    @property
    def repeats(self):
        return self.max_error is not None

    def __post_init__(self):
        Quantized(self.bits, self.group)  # raises on a value out of range
        if self.max_error is not None and not self.max_error > 0:
            raise EfftuneError(f"mesa's max_error is a share of the gradient above 0, not {self.max_error}.")

    def plan(self, plan):
        plan.keep_in_blocks(self, self._keep(self.bits))
        plan.keep(self, self.target_modules, self._keep(self.bits))

    def loaded(self, run):
        chosen = run.state(self)
        if self.max_error is not None:
            chosen._places = chosen._places or _places(run.model)
            self._use(chosen._places, chosen.bits or {})

    def backward(self, micro, inner):
        self._measure(micro)
        return inner(micro)

    def _measure(self, micro: Micro) -> None:
        """Chooses bits for the places of `max_error`, once, on this micro-batch."""
        model, chosen = micro.model, micro.run.state(self)
        if self.max_error is None or chosen.bits is not None or chosen._idle:
            return
        chosen._places = chosen._places or _places(model)
        if not chosen._places:  # samples, recomputes: nothing is kept as codes
            chosen.bits = {}
            return
        bits, error = self._choose(model, chosen._places, lambda: micro.loss(model, micro.batch), self.max_error)
        if not math.isfinite(error):
            return  # of a loss that is not: the next micro-batch will tell
        chosen.bits, chosen.error = bits, error
        self._use(chosen._places, bits)
        if error > self.max_error:
            warnings.warn(
                f"mesa found no keeps with a gradient error of at most {self.max_error:.1%}; with the best it tried it "
                f"is {error:.1%}.",
                stacklevel=3,
            )

    def _keep(self, bits: int) -> Keep:
        return Quantized(bits, self.group) if bits else Exact()

    def _use(self, places: Places, bits: dict[str, int]) -> None:
        _set(places, {name: self._keep(bits.get(name, self.bits)) for name in places})

    def _choose(
        self, model: nn.Module, places: Places, loss: Callable[[], Tensor], max_error: float
    ) -> tuple[dict[str, int], float]:
        """The bits of each place, and the error of the worst block with them."""
        truth = {name: Aligned() for name in places}
        reference = truth if self.bits == 8 else {name: Quantized(8, self.group) for name in places}
        with probing(model, places) as probe:
            exact = probe.gradient(loss, reference)
            costs, errors = {}, {}
            for name in places:
                counting = Counting(self.bits, self.group)
                errors[name] = probe.errors(probe.gradient(loss, {**reference, name: counting}), exact)
                costs[name] = {bits: counting.bytes(bits) for bits in (self.bits, 8, EXACT)}
            if max_error**2 < 10 * max(total(self.bits, dict.fromkeys(places, 8), errors).values(), default=0.0):
                reference = truth  # 8 bits are no measure for errors as small as their own
            bits, worst, limit = dict.fromkeys(places, self.bits), math.inf, (MARGIN * max_error) ** 2
            for _ in range(ROUNDS):
                bits = allocate(self.bits, costs, errors, limit)
                keeps = {name: self._keep(b) if b else Aligned() for name, b in bits.items()}
                found: dict[str, float] = defaultdict(float)
                for _ in range(DRAWS):
                    probe.advance()
                    drawn = probe.gradient(loss, keeps)
                    for block, error in probe.errors(drawn, probe.gradient(loss, reference)).items():
                        found[block] += error / DRAWS
                worst = max(found.values(), default=0.0, key=lambda e: math.inf if math.isnan(e) else e)
                if worst <= (MARGIN * max_error) ** 2 or not math.isfinite(worst):
                    break
                limit *= 0.9 * (MARGIN * max_error) ** 2 / worst
        return bits, worst**0.5

    def after_step(self, run):
        chosen = run.state(self)
        if self.max_error is not None and chosen.bits is None and not chosen._idle and run.step == 0:
            warnings.warn(
                f"mesa has not measured yet (that takes a call of tuner.backward(batch, loss_fn), and a finite loss): "
                f"until then everything stays at {self.bits} bits.",
                stacklevel=2,
            )

    @contextmanager
    def exactly(self, run: Run) -> Iterator[None]:
        run.state(self)._idle = True
        try:
            with exact_keeps(run.model):
                yield
        finally:
            run.state(self)._idle = False

    def report(self, run):
        chosen = run.state(self)
        if self.max_error is None:
            return None
        if chosen.bits is None:
            return f"mesa: {self.bits} bits everywhere, until the first micro-batch tells where more are needed"
        if not chosen.bits:
            return "mesa: keeps no codes, so that max_error has nothing to choose"
        counts = Counter(f"{bits} bits" if bits else "exact" for bits in chosen.bits.values())
        spread = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
        return f"mesa: keeps {spread}; gradient error at most {chosen.error:.1%} in every block"


def _block(name: str) -> str:
    """The path of a module or parameter up to its first number, which counts the blocks of a model."""
    numbered = re.match(r"(.*?\b\d+)\.", name)
    return numbered[1] if numbered else "the rest"


def _places(model: nn.Module) -> Places:
    found: Places = {}
    for path, module in model.named_modules():
        if isinstance(getattr(module, "keep", None), Quantized):
            found.setdefault(f"{_block(path)}: {type(module).__name__}", []).append(module)
    return found


def _set(places: Places, keeps: dict[str, Any]) -> None:
    for name, modules in places.items():
        for module in modules:
            module.keep = keeps[name]


def allocate(
    bits: int, costs: dict[str, dict[int, float]], errors: dict[str, dict[str, float]], limit: float
) -> dict[str, int]:
    """The bits of each place, chosen so that the errors of every block add up to `limit` at most. The choice is greedy:
    places with the most error per byte come first.

    Args:
        costs: place -> bits -> bytes.   errors: place -> block -> squared relative error of that block's gradient with
            `bits` in this place; they add up, since places draw independently, and 8 bits have 1/289 of 4 bits'.
    """
    chosen = dict.fromkeys(costs, bits)
    while True:
        over = {block: error - limit for block, error in total(bits, chosen, errors).items() if error > limit}
        best, most = None, 0.0
        for name, now in chosen.items():
            if now == EXACT or not over:
                continue
            then = 8 if now < 8 else EXACT
            fall = _share(bits, now) - _share(bits, then)
            gain = sum(min(excess, errors[name].get(block, 0.0) * fall) for block, excess in over.items())
            price = max(1.0, costs[name][then] - costs[name][now])
            if gain / price > most:
                best, most = (name, then), gain / price
        if best is None:
            return chosen
        chosen[best[0]] = best[1]


def total(bits: int, chosen: dict[str, int], errors: dict[str, dict[str, float]]) -> dict[str, float]:
    """The squared relative error of each block with the bits of `chosen`."""
    found: dict[str, float] = defaultdict(float)
    for name, blocks in errors.items():
        for block, error in blocks.items():
            found[block] += error * _share(bits, chosen[name])
    return found


def _share(bits: int, other: int) -> float:
    """The variance of rounding to `other` bits, in units of that of `bits`."""
    return 0.0 if other == EXACT else ((2**bits - 1) / (2**other - 1)) ** 2


@dataclass(frozen=True)
class Aligned(Exact):
    """Keeps exactly, and takes a seed like keeps that draw, so that what is drawn after it (dropout) stays the same."""

    random = True


@dataclass(frozen=True, eq=False)
class Counting(Quantized):
    """Keeps codes, and notes the shapes of what it keeps."""

    seen: list[tuple[torch.Size, int]] = field(default_factory=list)

    def hold(self, z, seed, stream=0):
        self.seen.append((z.shape, z.element_size()))
        return super().hold(z, seed, stream)

    def bytes(self, bits: int) -> float:
        """How many bytes the tensors that it has seen take in `bits`."""
        if bits == EXACT:
            return sum(m * k * size for (m, k), size in self.seen)
        return sum(m * (k * bits / 8 + 4 * -(-k // self.group)) for (m, k), _ in self.seen)


@dataclass
class GradientProbe:
    """Gradients of one micro-batch with different keeps and the same random numbers, which leave no trace."""

    model: nn.Module
    places: Places
    device: torch.device
    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...] = ()

    def gradient(self, loss: Callable[[], Tensor], keeps: dict[str, Any]) -> dict[str, Tensor]:
        _set(self.places, keeps)
        watched = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with replaying(self.before, self.device), discarding(self.model), sampled_gradients(watched) as seen:
            loss().backward()
            self.after = generators(self.device)
        return seen

    def advance(self) -> None:
        """Takes other random numbers from here on."""
        self.before = self.after

    def errors(self, drawn: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
        """‖drawn − exact‖² / ‖exact‖² of each block, over its parameters."""
        parameters = dict(self.model.named_parameters())
        error: dict[str, float] = defaultdict(float)
        size: dict[str, float] = defaultdict(float)
        for name, value in exact.items():
            error[_block(name)] += float(distance(drawn[name], value, parameters[name]))
            size[_block(name)] += float(distance(torch.zeros_like(value), value, parameters[name]))
        return {block: error[block] / size[block] for block in size if size[block]}


@contextmanager
def probing(model: nn.Module, places: Places) -> Iterator[GradientProbe]:
    """Within it, everything that draws for backward beside `places` (sampled rows) is kept exactly. Afterwards all
    keeps are those of before."""
    drawing = drawing_keeps(model)
    for module, name, _ in drawing:
        setattr(module, name, Aligned())
    try:
        device = next(model.parameters()).device
        with statistics_kept(model):
            yield GradientProbe(model, places, device, generators(device))
    finally:
        for module, name, keep in drawing:
            setattr(module, name, keep)
