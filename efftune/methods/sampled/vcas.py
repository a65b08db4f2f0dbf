"""VCAS: backward on the samples and rows that carry the gradient, as few as the variance of SGD allows."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from efftune.errors import EfftuneError
from efftune.linear import Exact, Linear
from efftune.linear.contracts import Keep, product_t
from efftune.linear.handle import load
from efftune.linear.keep.sampled import Sampled
from efftune.methods._base import ESTIMATES, Method, Run, State
from efftune.methods._gradients import discarding, distance, inverse_share, sampled_gradients
from efftune.nn.subbatch import Recompute, probabilities, statistics_kept
from efftune.random_state import generators, set_generators
from efftune.structure import blocks


@dataclass
class Window:
    """What the micro-batches that were measured so far have given."""

    count: int = 0
    mean: dict[str, Tensor] = field(default_factory=dict)  # of the looked-at coordinates of each weight's gradient
    spread: dict[str, Tensor] = field(default_factory=dict)  # Σ over batches ‖gradient − mean‖² of those coordinates
    act: Any = 0.0  # Σ over batches and repeats ‖drawn − exact‖²
    norms: list[list[Tensor | None]] = field(default_factory=list)  # ‖G_i‖ of batch, block
    weight: dict[str, Tensor] = field(default_factory=dict)  # Σ over batches of V_w of each layer

    def add(self, gradient: dict[str, Tensor], norms: list[Tensor | None], weight: dict[str, Tensor]) -> None:
        """Welford's update: the spread is small against the mean, and a difference of squares would lose it."""
        self.count += 1
        for name, g in gradient.items():
            mean = self.mean.setdefault(name, torch.zeros_like(g))
            off = g - mean
            mean += off / self.count
            self.spread[name] = self.spread.get(name, 0.0) + (off * (g - mean)).sum(dtype=torch.float64)
        self.norms.append(norms)
        for name, v in weight.items():
            self.weight[name] = self.weight.get(name, 0.0) + v


@dataclass
class Controller(State):
    """What vcas has learnt."""

    share: float = 1.0  # s
    started: int = -1  # the step of the last window
    window: Window | None = None
    samples: list[float] = field(default_factory=list)  # ρ of each block; none before the first adaptation
    rows: dict[str, float] = field(default_factory=dict)  # ν of each layer
    _idle: bool = False  # within `exactly`: measures nothing

    def state_dict(self):
        window = None if self.window is None else dict(vars(self.window))
        return {**super().state_dict(), "window": window}

    def load_state_dict(self, state, device):
        window = tree_map_only(Tensor, lambda t: t.to(device), state["window"])
        super().load_state_dict({**state, "window": None if window is None else Window(**window)}, device)


@dataclass(frozen=True)
class Vcas(Method):
    """Runs forward on all samples and backward on a part of them, chosen so that the gradient stays unbiased and its
    variance grows by at most tau_act + tau_w of what the mini-batch has anyway.

    The blocks of the transformer's stack keep only their inputs and run again in backward (`nn.subbatch`): block l on a
    share ρ_l of the samples, which falls with its depth below the loss. Within those samples each linear layer takes
    its weight's gradient from a share ν_l of the rows. All shares begin at 1. Every `interval` steps, `batches`
    micro-batches are measured (of the same step if it has as many, else of the steps that follow): their exact
    gradients, which train as ever, and `batches` repeats of each with samples drawn but all rows. With V_s the variance
    of a micro-batch's gradient, V_act what drawing samples adds to it and V_w,l what drawing rows would add,

        s   ← s + alpha·sign(V_act − tau_act·V_s)           the share of Σ‖G_i‖ that the kept samples must hold
        ρ_l ← 0.6·ρ_l + 0.4·max_{j≤l} p_j(s)                p_j(s): the least share of the samples that holds it
        ν_l ← min(1, ν_l/beta) if V_w,l > tau_w·V_s,l, else ν_l·beta

    V_s and V_act are taken over the stack's weights, from one coordinate in 97. V_w,l is Σ_i (1/q_i − 1)‖g_i‖²‖x_i‖²,
    which holds for rows drawn independently; systematic sampling stays below it.
    The method needs `tuner.backward`: with a loop that calls loss.backward() itself the shares stay at 1.

    Args:
        tau_act, tau_w: what drawing samples and drawing rows may add, as shares of V_s and V_s,l.
        alpha, beta: the steps by which s and ν_l are adapted.
        interval: 0 measures nothing; sample_ratio and row_ratio are then the shares, for the whole run.
        batches: how many micro-batches are measured, and how often each is repeated.
        sample_ratio, row_ratio: fixed shares, which interval=0 belongs to.
    Memory: that of block checkpointing. While it measures, one copy of a block's gradients and 1 % of all.
    Cost: 1 + 3ρ times a block's forward, where checkpointing takes 4. Measuring takes `batches`² steps every `interval`
        steps.
    Raises: EfftuneError where no weight of the stack trains, or where backward on a part of the batch would be wrong.
    Source: Wang, Chen, Zhu 2024, arXiv:2402.17227, algorithm 1; in its equation 7 the sign of ν's update is reversed.
    """

    tau_act: float = 0.025
    tau_w: float = 0.025
    alpha: float = 0.01
    beta: float = 0.95
    interval: int = 100
    batches: int = 2
    sample_ratio: float = 1.0
    row_ratio: float = 1.0

    name = "vcas"
    place = ESTIMATES
    State = Controller

    def __post_init__(self):
        if not (0 < self.sample_ratio <= 1 and 0 < self.row_ratio <= 1 and 0 < self.beta < 1):
            raise EfftuneError(f"{self} needs sample_ratio and row_ratio in (0, 1] and beta between 0 and 1.")
        if self.interval < 0 or self.batches < 2:
            raise EfftuneError(f"{self} needs interval >= 0 and, for a variance, batches >= 2.")
        if self.interval and (self.sample_ratio < 1 or self.row_ratio < 1):
            raise EfftuneError(f"{self} adapts its shares, which begin at 1; for fixed ones add interval=0.")

    def plan(self, plan):
        name, stack = plan.blocks()
        layers = plan.inside(name)
        if not any(layer.trains for layer in layers) and not any(n.startswith(name + ".") for n in plan.parameters):
            raise EfftuneError(
                f"vcas finds nothing that trains in {name}; give the recipe a method that trains its blocks, as in "
                "'full + vcas'."
            )
        for layer in layers:
            if layer.delta.random:  # its mask goes by position in the batch
                raise EfftuneError(
                    f"vcas runs part of a batch again, and {layer.name} has dropout; use lora_dropout=0.0."
                )
            if layer.keep.keeps and not layer.keep.restores and not _own(layer.keep):
                raise EfftuneError(
                    f"{layer.name} samples its rows already, by another method than vcas; use one of the two."
                )
        keep = Sampled(self.row_ratio, min_rows=1, at="backward")
        plan.wish(self, [x for x in layers if x.keeps and (type(x.keep) is Exact or _own(x.keep))], keep=keep)
        plan.run_again(self, stack, self.sample_ratio)

    def loaded(self, run):
        stack, controller = blocks(run.model)[1], run.state(self)
        samples = controller.samples or [self.sample_ratio] * len(stack)
        for recompute, ratio in zip(_recomputes(stack), samples, strict=True):
            recompute.ratio = ratio
        for name, layer in _sampled(stack).items():
            _set_rows(layer, controller.rows.get(name, self.row_ratio))

    def backward(self, micro, inner):
        model, step, controller = micro.model, micro.run.step, micro.run.state(self)
        stack = blocks(model)[1]
        due = self.interval and step % self.interval == 0 and controller.started != step and not controller._idle
        if due and controller.window is None:
            controller.started, controller.window = step, Window()
        plain = functools.partial(inner, micro)
        window = controller.window
        if window is None or controller._idle:
            return plain()
        loss = self._measure(model, stack, window, plain)
        if window.count == self.batches:
            self._adapt(stack, controller, window)
            controller.window = None
        return loss

    def _measure(
        self, model: nn.Module, stack: nn.ModuleList, window: Window, backward: Callable[[], Tensor]
    ) -> Tensor:
        """One micro-batch: its exact gradient, which stays, and `batches` repeats with samples drawn, which do not."""
        device = next(stack.parameters()).device
        recomputes, layers = _recomputes(stack), _sampled(stack)
        watched = {name: p for name, p in stack.named_parameters() if p.requires_grad}
        before = generators(device)
        with measuring(recomputes, repeat=0, ratio=1.0), keeping(layers, {n: Exact() for n in layers}):
            with sampled_gradients(watched) as exact:
                loss = backward()
            norms = [r.norms for r in recomputes]
        after = generators(device)
        probes = {n: VarianceProbe(_rows(layer), []) for n, layer in layers.items()}
        for repeat in range(1, self.batches + 1):
            set_generators(before, device)  # the same dropout
            with measuring(recomputes, repeat), keeping(layers, probes), discarding(model):
                with sampled_gradients(watched) as drawn, statistics_kept(model):
                    backward()
            window.act += sum(distance(drawn[n], exact[n], p) for n, p in watched.items() if n in exact and n in drawn)
        set_generators(after, device)
        window.add(exact, norms, {n: torch.stack(p.seen).sum() / self.batches for n, p in probes.items() if p.seen})
        return loss

    def _adapt(self, stack: nn.ModuleList, controller: Controller, window: Window) -> None:
        parameters = dict(stack.named_parameters())
        spread = {n: float(v) * inverse_share(parameters[n]) / (self.batches - 1) for n, v in window.spread.items()}
        v_s, v_act = sum(spread.values()), float(window.act) / self.batches**2
        sign = (v_act > self.tau_act * v_s) - (v_act < self.tau_act * v_s)
        controller.share = min(1.0, max(0.0, controller.share + self.alpha * sign))
        least = [0.0] * len(stack)
        for norms in window.norms:
            for i, n in enumerate(norms):
                least[i] += smallest_share(n, controller.share) / self.batches if n is not None else 0.0
        for recompute, ratio in zip(_recomputes(stack), accumulate(least, max), strict=True):
            if ratio:  # 0: no gradient came so far down
                recompute.ratio = 0.6 * recompute.ratio + 0.4 * ratio
        for name, layer in _sampled(stack).items():
            own = [spread[n] for n in (f"{name}.{p}" for p, _ in layer.named_parameters(recurse=False)) if n in spread]
            if own and name in window.weight:
                more = float(window.weight[name]) / self.batches > self.tau_w * sum(own)
                ratio = _rows(layer) / self.beta if more else _rows(layer) * self.beta
                _set_rows(layer, min(1.0, ratio))
        controller.samples = [recompute.ratio for recompute in _recomputes(stack)]
        controller.rows = {name: _rows(layer) for name, layer in _sampled(stack).items()}

    def after_step(self, run):
        if self.interval and run.step == 0 and run.state(self).started < 0:
            warnings.warn(
                "vcas adapts in tuner.backward(batch, loss_fn), which this loop does not call: every sample and row "
                "stays in use.",
                stacklevel=2,
            )

    @contextmanager
    def exactly(self, run: Run) -> Iterator[None]:
        stack, controller = blocks(run.model)[1], run.state(self)
        layers = _sampled(stack)
        controller._idle = True
        try:
            with measuring(_recomputes(stack), repeat=0, ratio=1.0), keeping(layers, {n: Exact() for n in layers}):
                yield
        finally:
            controller._idle = False


@dataclass(frozen=True, eq=False)
class VarianceProbe(Exact):
    """Keeps exactly, and notes V_w = Σ_i (1/q_i − 1)‖g_i‖²‖z_i‖², which drawing `ratio` of the rows would add."""

    ratio: float
    seen: list[Tensor]

    def weight_grad(self, g, kept):
        z = load(kept[0])
        self.seen.append(row_variance(row_norms(g) * row_norms(z), self.ratio))
        return product_t(g, z)


def row_norms(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=1, dtype=torch.promote_types(z.dtype, torch.float32))


def row_variance(score: Tensor, ratio: float) -> Tensor:
    """E‖Σ_i (b_i/q_i − 1) g_i x_iᵀ‖² for independent b_i ~ Bernoulli(q_i), score_i = ‖g_i‖‖x_i‖, Σq = ratio·rows."""
    q = probabilities(score, max(1.0, ratio * score.numel()))
    return (score.double().square() * torch.where(score > 0, 1 / q - 1, 0.0)).sum()


def smallest_share(norms: Tensor, share: float) -> float:
    """The least n/B such that n of the B norms hold `share` of their sum."""
    if share >= 1:
        return 1.0
    held = norms.double().sort(descending=True).values.cumsum(0)
    return min(norms.numel(), int((held < share * held[-1]).sum()) + 1) / norms.numel()


def _own(keep: Keep) -> bool:
    return isinstance(keep, Sampled) and keep.at == "backward" and keep.min_rows == 1


def _recomputes(stack: nn.ModuleList) -> list[Recompute]:
    return [vars(block)["forward"] for block in stack]


def _sampled(stack: nn.ModuleList) -> dict[str, Linear]:
    return {n: m for n, m in stack.named_modules() if isinstance(m, Linear) and _own(m.keep)}


def _rows(layer: Linear) -> float:
    return cast(Sampled, layer.keep).ratio


def _set_rows(layer: Linear, ratio: float) -> None:
    layer.keep = dataclasses.replace(cast(Sampled, layer.keep), ratio=ratio)


@contextmanager
def measuring(recomputes: list[Recompute], repeat: int, ratio: float | None = None) -> Iterator[None]:
    """Blocks note ‖G_i‖, draw dropout by sample at every ratio, and select from another stream for each repeat."""
    ratios = [r.ratio for r in recomputes]
    for r in recomputes:
        r.repeat, r.by_row, r.record, r.norms = repeat, True, True, None
        r.ratio = r.ratio if ratio is None else ratio
    try:
        yield
    finally:
        for r, before in zip(recomputes, ratios, strict=True):
            r.repeat, r.by_row, r.record, r.ratio = 0, False, False, before


@contextmanager
def keeping(layers: dict[str, Linear], keeps: dict[str, Any]) -> Iterator[None]:
    before = {name: layer.keep for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.keep = keeps[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.keep = before[name]
