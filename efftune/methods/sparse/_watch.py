"""Looking at the gradients of whole weights, of which a few entries train: a product at a time, and none is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.contracts import Call, Delta, Keep, product_t
from efftune.linear.delta.columns import Columns
from efftune.linear.delta.entries import Entries
from efftune.methods._base import Micro, autograd, exact_keeps
from efftune.methods._gradients import discarding
from efftune.methods.sparse._scores import Rows
from efftune.nn.subbatch import statistics_kept

See = Callable[[str, Tensor, Tensor], None]  # name of the layer, g̃ (L, N) and z̃ (L, K): dW = g̃ᵀ·z̃


@dataclass(frozen=True)
class Peek(Keep):
    """What another keep gives for a weight gradient is shown to somebody first."""

    keep: Keep
    see: Callable[[Tensor, Tensor], None]

    def operands(self, g, kept):
        found = self.keep.operands(g, kept)
        self.see(*found)
        return found


@dataclass(frozen=True)
class Watched(Delta):
    """Another delta, of entries or columns, of which each call is shown to somebody; all of x is kept. The gradient of
    columns is nobody's business then."""

    inner: Entries | Columns
    see: Callable[[Tensor, Tensor], None]
    called: Callable[[Tensor], None]

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.names

    @property
    def in_place(self) -> bool:
        return self.inner.in_place

    def forward(self, c, x):
        if torch._C._current_graph_task_id() < 0:  # else backward runs a part of the model again
            self.called(x)
        y, _ = self.inner.forward(_frozen(c), x)
        return y, c.save(x, c.source) if any(c.need.p) else ()

    def backward(self, c, dy, saved, add=None):
        if isinstance(self.inner, Entries):
            return self.inner.backward(c._replace(keep=Peek(c.keep, self.see)), dy, saved, add)
        if any(c.need.p):
            self.see(*c.operands(dy, saved))
        return self.inner.backward(_frozen(c), dy, (), add)

    def put(self, c):
        self.inner.put(c)

    def take_back(self, c):
        self.inner.take_back(c)


def _frozen(c: Call) -> Call:
    """The call, where nothing of the delta trains."""
    return c._replace(need=c.need._replace(p=(False,) * len(c.p)))


@contextmanager
def watching(
    layers: dict[str, Linear], see: See, called: Callable[[str, Tensor], None] = lambda name, x: None
) -> Iterator[None]:
    """Within it, `see` is called in backward for each call of these layers, of which entries or columns train, and
    `called` in forward, with x (M, K)."""
    kept = {name: (layer.delta, layer._eval_delta) for name, layer in layers.items()}
    for name, layer in layers.items():
        inner = cast(Entries | Columns, layer.delta)
        layer.delta = layer._eval_delta = Watched(inner, partial(see, name), partial(called, name))
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.delta, layer._eval_delta = kept[name]


@contextmanager
def training(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within it these train, also those that a schedule has frozen for this step."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def gradients(micro: Micro, layers: dict[str, Linear], see: See) -> None:
    """Goes through the micro-batch once, and calls `see` once for each of the layers that has a gradient: g and z of a
    layer that is called several times lie one below the other. Inputs are kept exactly, and no gradient is left behind.
    """
    calls, parts = Counter[str](), dict[str, list[tuple[Tensor, Tensor]]]()

    def show(name: str) -> None:
        g, z = [list(part) for part in zip(*parts.pop(name), strict=True)]
        see(name, torch.cat(g) if len(g) > 1 else g[0], torch.cat(z) if len(z) > 1 else z[0])

    def gather(name: str, g: Tensor, z: Tensor) -> None:
        calls[name] -= 1
        parts.setdefault(name, []).append((g, z))
        if calls[name] == 0:
            show(name)

    with (
        training(layer.values for layer in layers.values()),
        watching(layers, gather, lambda name, x: calls.update([name])),
        exact_keeps(micro.model),
        discarding(micro.model),
        statistics_kept(micro.model),
    ):
        autograd(micro)
    for name in list(parts):  # of a layer that had fewer backward passes than calls
        show(name)


def inputs(micro: Micro, layers: dict[str, Linear], see: Callable[[str, Tensor], None]) -> None:
    """Goes through the micro-batch once, without backward; `see` is given x (M, K) of each call of these layers."""
    with watching(layers, lambda *_: None, see), statistics_kept(micro.model), torch.no_grad():
        micro.loss(micro.model, micro.batch)


class NotFinite(EfftuneError):
    """What a micro-batch shows is NaN or Inf."""


def overflows(micro: Micro) -> bool:
    """Whether what is not finite may be due to the scale of the loss: a GradScaler lowers it then and skips the step,
    so that the next micro-batch is the step's first one."""
    return micro.scale > 1


def gradient(g: Tensor, z: Tensor) -> Rows:
    """|gᵀ·z|, by rows."""
    return lambda a, b: product_t(g[:, a:b], z).float().abs_()


def finite_gradient(g: Tensor, z: Tensor) -> Rows:
    """The same. Raises: NotFinite."""
    gradients = gradient(g, z)

    def rows(a: int, b: int) -> Tensor:
        scores = gradients(a, b)
        if not bool(scores.isfinite().all()):
            raise NotFinite("A gradient that entries are picked by is NaN or Inf; look for it in weights and batch.")
        return scores

    return rows
