"""Layers that read one tensor work as one: the first of them that is called computes what all of them give.

For each layer alone, x is read for a thin product, dx is made and then summed up by autograd, and the input is kept.
For all of them together a delta multiplies by what the layers add side by side (`Delta.forward_all`), and dx is
accumulated in place.
"""

from __future__ import annotations

import operator
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from efftune.errors import refuse_second_derivative
from efftune.linear.contracts import Base, Call, Delta, Keep, Need, Stored, Tensors
from efftune.linear.function import applied, as_matrix, new
from efftune.linear.handle import Source, flatten, reshaped, source_of, unflatten
from efftune.linear.module import Linear
from efftune.ops._op import forced_backend, use_backend
from efftune.ops.draw_seed import draw_seed

Kind = tuple[tuple[Base, Delta, Keep], tuple, Need]  # of one layer: its axes, the shape and dtype of W, what is needed
Known = tuple[tuple[Base, Delta, Keep], Stored, Tensors, Tensor | None, Need]  # what a layer works with
State = tuple[list, list]  # objects that are the same ones, and numbers that are equal, if a layer has not changed

SMALL = 2**13  # elements of x: for fewer, each layer alone is faster, by what Python takes to put them together


def pays(x: Any) -> bool:
    """Whether layers that read x are faster as one."""
    return isinstance(x, Tensor) and x.numel() >= SMALL


class Group:
    """Layers that are expected to read one tensor in a forward pass that is under way.

    The first that is called computes what all of them give that can be computed now. Each of the others fetches its own
    if it is called with the same tensor, unchanged, and has not changed itself. Else it computes alone, as it does for
    fewer than SMALL elements, under torch.compile, where autocast casts, and where it has hooks, draws for itself or
    has another dtype. Whether gradients are recorded makes no difference: a block that is run again in backward gives
    the same bits.
    """

    __slots__ = ("hooks", "layers", "reads", "results", "x")

    def __init__(self, layers: list[Linear]):
        self.layers, self.hooks = layers, _saved_tensor_hooks()
        self.x: Tensor | None = None  # what was read, as long as there are results
        self.reads: tuple | None = None  # its version, and whether gradients are recorded
        self.results: dict[Linear, tuple[Tensor, State, bool]] | None = None  # None: nobody has been called

    def output(self, layer: Linear, x: Tensor) -> Tensor | None:
        """Returns what `layer` gives for x, or None where the layer computes alone."""
        results = self.results
        if results is None:
            self.results = {}  # one attempt in each forward pass
            return self._compute(layer, x) if pays(x) else None
        if x is not self.x or layer not in results or is_compiling():
            return None
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            return None  # it began after the first layer
        y, then, draws = results.pop(layer)
        if not results:
            self.x = None
        if self.reads != _reading(x) or not _same(_state(layer), then) or _saved_tensor_hooks() != self.hooks:
            return None
        if draws:
            draw_seed()  # as the layer alone would, so that whoever draws next draws the same
        return y

    def _compute(self, layer: Linear, x: Tensor) -> Tensor | None:
        if is_compiling() or x.is_inference() or torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            return None
        # torch's checkpointing calls a part of a forward pass again, and wants as many tensors to be saved as before.
        if _saved_tensor_hooks() != self.hooks or (first := _known(layer, x)) is None:
            return None
        source = source_of(x, create=layer.keep.random) if torch.is_grad_enabled() else None
        members = {layer: first}
        for other in self.layers:
            if other is not layer and (found := _known(other, x)) is not None:
                members[other] = found
        rows = x.numel() // x.shape[-1]
        members = {m: known for m, known in members.items() if _joins(known, first, rows, source)}
        if layer not in members or len(members) < 2:
            return None
        if source is not None and layer.scores is not None:
            source.scores = layer.scores.of_rows(x)
        kinds, biases, tensors = [], [], []
        for axes, w, p, bias, need in members.values():
            kinds.append((axes, w[1:], need))
            biases.append(bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))
            tensors += w.tensors + p
        seed = draw_seed() if _draws(first) else None
        ys = _apply(kinds, _runs(kinds), forced_backend(), source, seed, x, *biases, *tensors)
        self.x, self.reads = x, _reading(x)
        self.results = {
            member: (y, _state(member), _draws(known))
            for (member, known), y in zip(members.items(), ys, strict=True)
            if member is not layer
        }
        return ys[0]


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]


def _reading(x: Tensor) -> tuple:
    return x._version, x.requires_grad, torch.is_grad_enabled()


def _state(layer: Linear) -> State:
    tensors = [*layer._parameters.values(), *layer._buffers.values()]
    present = [t for t in tensors if t is not None]
    numbers = [n for t in present for n in (0 if t.is_inference() else t._version, t.requires_grad)]
    return [*tensors, layer.base, layer.delta, layer.keep], [*numbers, layer.training]


def _same(now: State, then: State) -> bool:
    return now[1] == then[1] and all(map(operator.is_, now[0], then[0]))


def _known(layer: Linear, x: Tensor) -> Known | None:
    """What the layer works with, if what it gives can be told without calling it."""
    own = vars(layer)
    # Hooks may change x, or the layer's own weights for the time of its call.
    if (
        own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        or "forward" in own
    ):  # fmt: skip
        return None
    w = layer.stored()
    if x.shape[-1] != w.shape[1] or x.dtype != w.dtype:
        return None
    axes, p, bias, need = layer.operands(x, w)
    # A delta that draws takes a seed of its own, from a generator, in the order in which layers are called.
    return None if axes[1].random or (any(need.w) and not layer.w_trains) else (axes, w, p, bias, need)


def _draws(known: Known) -> bool:
    """Whether the layer's keep takes a seed."""
    return known[0][2].random and known[4].any()


def _joins(known: Known, first: Known, rows: int, source: Source | None) -> bool:
    """Whether a layer keeps with the seed of the first that is called what it would keep alone."""
    keep, need = known[0][2], known[4]
    return not _draws(known) or (keep.shared(rows, source) and (keep, need) == (first[0][2], first[4]))


def _runs(kinds: list[Kind]) -> list[list[int]]:
    """The places of the layers that have one delta and one keep."""
    (_, delta, keep), _, _ = kinds[0]
    if all([axes[1] is delta and axes[2] is keep for axes, _, _ in kinds]):
        return [[*range(len(kinds))]]
    runs: list[tuple[list, list[int]]] = []
    for i, ((_, *kind), _, _) in enumerate(kinds):
        for known, places in runs:
            if known == kind:
                places.append(i)
                break
        else:
            runs.append((kind, [i]))
    return [places for _, places in runs]


def _calls(kinds: list[Kind], tensors, biases, seed: Tensor | None, source: Source | None) -> list[Call]:
    calls, at = [], 0
    for ((base, _, keep), what, need), bias in zip(kinds, biases, strict=True):
        p = at + len(need.w)
        after = p + len(need.p)
        w = new(Stored, (tensors[at:p], *what))
        calls.append(new(Call, (base, keep, w, tensors[p:after], bias, seed, need, source)))
        at = after
    return calls


class GroupFunction(torch.autograd.Function):
    """As `LinearFunction`, for several layers of one x. What it saves is what they would, and the input once."""

    @staticmethod
    def forward(ctx, kinds: list[Kind], runs, backend, source, seed, x, *flat):
        ctx.set_materialize_grads(False)  # what nobody uses has no gradient
        count, shape = len(kinds), x.shape
        matrix = len(shape) == 2
        rows = x if matrix else x.reshape(-1, shape[-1])
        tensors, saved, sizes = flat[count:], [], []
        calls, ys = _calls(kinds, tensors, flat[:count], seed, source), [rows] * count
        for run in runs:
            outputs, kept = kinds[run[0]][0][1].forward_all([calls[i] for i in run], rows)
            for i, y in zip(run, outputs, strict=True):
                ys[i] = y if matrix else reshaped(y, (*shape[:-1], y.shape[-1]))
            for parts in kept:
                saved += parts
            sizes.append([len(parts) for parts in kept])
        saved, structure = flatten(tuple(saved))
        ctx.save_for_backward(*tensors, *saved)
        source = None if source is None else weakref.ref(source)
        ctx.call = kinds, runs, sizes, structure, source, backend, len(tensors), None if matrix else shape
        unneeded = [y for y, kind in zip(ys, kinds, strict=True) if not kind[2].any()]
        if unneeded:
            ctx.mark_non_differentiable(*unneeded)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        refuse_second_derivative("efftune.Linear")
        kinds, runs, sizes, structure, source, backend, num_tensors, shape = ctx.call
        source = None if source is None else source()
        if source is not None:
            source.kept.clear()  # what reads the same tensor in another forward pass draws anew
        tensors = ctx.saved_tensors
        saved = unflatten(tensors[num_tensors:], structure)
        calls = _calls(kinds, tensors, [None] * len(kinds), None, None)
        dys = [None if dy is None else (dy if shape is None else as_matrix(dy)).contiguous() for dy in dys]
        if backend is None:
            dx, grads = _backward(kinds, runs, sizes, calls, dys, saved)
        else:
            with use_backend(backend):
                dx, grads = _backward(kinds, runs, sizes, calls, dys, saved)
        if dx is not None and shape is not None:
            dx = dx.view(*shape)
        dbs = [dy.sum(0) if kind[2].bias and dy is not None else None for dy, kind in zip(dys, kinds, strict=True)]
        return None, None, None, None, None, dx, *dbs, *grads


def _backward(kinds: list[Kind], runs, sizes, calls, dys, saved: tuple) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx of all layers, and the gradients of their tensors one after another."""
    dx, grads, at = None, {}, 0
    for run, lengths in zip(runs, sizes, strict=True):
        kept = []
        for length in lengths:
            kept.append(saved[at : at + length])
            at += length
        delta = kinds[run[0]][0][1]
        dx, found = delta.backward_all([calls[i] for i in run], [dys[i] for i in run], kept, dx)
        grads |= zip(run, found, strict=True)
    return dx, [g for i in range(len(kinds)) for part in grads[i] for g in part]


_apply = applied(GroupFunction)
