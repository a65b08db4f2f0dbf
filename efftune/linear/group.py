"""Layers that read one tensor work as one: the first of them that is called computes what all of them give.

For each layer alone, x is read for a thin product, dx is made and then summed up by autograd, and the input is kept.
For all of them together a delta multiplies by what the layers add side by side (`Delta.forward_all`), and dx is
accumulated in place.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from efftune.errors import refuse_second_derivative
from efftune.linear.contracts import Base, Call, Delta, Keep, Need, Stored
from efftune.linear.function import applied, as_matrix, new
from efftune.linear.handle import Source, flatten, reshaped, source_of, unflatten
from efftune.linear.module import Linear
from efftune.ops._op import forced_backend, use_backend

Kind = tuple[tuple[Base, Delta, Keep], tuple, Need]  # of one layer: its axes, the shape and dtype of W, what is needed
State = tuple[list, list]  # objects that are the same ones, and numbers that are equal, if a layer has not changed


class Group:
    """Layers that are expected to read one tensor in a forward pass that is under way.

    The first that is called computes what all of them give that can be computed now. Each of the others fetches its own
    if it is called with the same tensor, unchanged, and has not changed itself. Else it computes alone, as it does
    under torch.compile, where autocast casts, and where it has hooks, draws or has another dtype. Whether gradients are
    recorded makes no difference: a block that is run again in backward gives the same bits.
    """

    __slots__ = ("hooks", "layers", "reads", "results", "x")

    def __init__(self, layers: list[Linear]):
        self.layers, self.hooks = layers, _saved_tensor_hooks()
        self.x: Tensor | None = None  # what was read, as long as there are results
        self.reads: tuple | None = None  # its version, and whether gradients are recorded
        self.results: dict[Linear, tuple[Tensor, State]] | None = None  # None: nobody has been called

    def output(self, layer: Linear, x: Tensor) -> Tensor | None:
        """What `layer` gives for x, or None: it computes alone."""
        results = self.results
        if results is None:
            self.results = {}  # one attempt in each forward pass
            return self._compute(layer, x)
        if x is not self.x or layer not in results or is_compiling():
            return None
        y, then = results.pop(layer)
        if not results:
            self.x = None
        unchanged = self.reads == _reading(x) and _same(_state(layer), then)
        return y if unchanged and _saved_tensor_hooks() == self.hooks else None

    def _compute(self, layer: Linear, x: Tensor) -> Tensor | None:
        if is_compiling() or x.is_inference() or torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            return None
        # torch's checkpointing calls a part of a forward pass again, and wants as many tensors to be saved as before.
        if _saved_tensor_hooks() != self.hooks:
            return None
        members, states, kinds, biases, tensors = [], [], [], [], []
        for member in (layer, *[other for other in self.layers if other is not layer]):
            if not _computable(member, x):
                if member is layer:
                    return None
                continue
            w = member.stored()
            axes, p, bias, need = member.operands(x, w)
            if any(need.w) and not member.w_trains:
                return None  # the layer itself says so
            members.append(member)
            states.append(_state(member))
            kinds.append((axes, w[1:], need))
            biases.append(bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))
            tensors += w.tensors + p
        if len(members) < 2:
            return None
        y, *ys = _apply(kinds, _runs(kinds), forced_backend(), source_of(x), x, *biases, *tensors)
        self.x, self.reads = x, _reading(x)
        self.results = dict(zip(members[1:], zip(ys, states[1:], strict=True), strict=True))
        return y


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _reading(x: Tensor) -> tuple:
    return x._version, x.requires_grad, torch.is_grad_enabled()


def _state(layer: Linear) -> State:
    tensors = [*layer._parameters.values(), *layer._buffers.values()]
    numbers = [number for t in tensors if t is not None for number in (t._version, t.requires_grad)]
    return [*tensors, layer.base, layer.delta, layer.keep], [*numbers, layer.training]


def _same(now: State, then: State) -> bool:
    return now[1] == then[1] and all(map(operator.is_, now[0], then[0]))


def _computable(layer: Linear, x: Tensor) -> bool:
    """Whether what the layer gives can be known without calling it."""
    own = vars(layer)
    # Hooks may change x, or the layer's own weights for the time of its call.
    if (
        own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        or "forward" in own
    ):  # fmt: skip
        return False
    # What draws takes its seeds from a generator, in the order in which layers are called.
    if layer.keep.random or (layer.training and layer.delta.random):
        return False
    return x.shape[-1] == layer.in_features and x.dtype == layer.stored().dtype


def _runs(kinds: list[Kind]) -> list[list[int]]:
    """The places of the layers that have one delta and one keep."""
    runs: list[tuple[tuple, list[int]]] = []
    for i, ((_, *kind), _, _) in enumerate(kinds):
        for known, places in runs:
            if known == kind:
                places.append(i)
                break
        else:
            runs.append((kind, [i]))
    return [places for _, places in runs]


def _calls(kinds: list[Kind], tensors, biases, source: Source | None) -> list[Call]:
    calls, at = [], 0
    for ((base, _, keep), what, need), bias in zip(kinds, biases, strict=True):
        p = at + len(need.w)
        after = p + len(need.p)
        w = new(Stored, (tensors[at:p], *what))
        calls.append(new(Call, (base, keep, w, tensors[p:after], bias, None, need, source)))
        at = after
    return calls


class GroupFunction(torch.autograd.Function):
    """As `LinearFunction`, for several layers of one x. What it saves is what they would, and the input once."""

    @staticmethod
    def forward(ctx, kinds: list[Kind], runs, backend, source, x, *flat):
        ctx.set_materialize_grads(False)  # what nobody uses has no gradient
        count, shape = len(kinds), x.shape
        matrix = len(shape) == 2
        rows = x if matrix else x.reshape(-1, shape[-1])
        tensors, saved, sizes = flat[count:], [], []
        calls, ys = _calls(kinds, tensors, flat[:count], source), [rows] * count
        for run in runs:
            outputs, kept = kinds[run[0]][0][1].forward_all([calls[i] for i in run], rows)
            for i, y in zip(run, outputs, strict=True):
                ys[i] = y if matrix else reshaped(y, (*shape[:-1], y.shape[-1]))
            for parts in kept:
                saved += parts
            sizes.append([len(parts) for parts in kept])
        saved, structure = flatten(tuple(saved))
        ctx.save_for_backward(*tensors, *saved)
        ctx.call = kinds, runs, sizes, structure, backend, len(tensors), None if matrix else shape
        unneeded = [y for y, kind in zip(ys, kinds, strict=True) if not kind[2].any()]
        if unneeded:
            ctx.mark_non_differentiable(*unneeded)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        refuse_second_derivative("efftune.Linear")
        kinds, runs, sizes, structure, backend, num_tensors, shape = ctx.call
        tensors = ctx.saved_tensors
        saved = unflatten(tensors[num_tensors:], structure)
        calls = _calls(kinds, tensors, [None] * len(kinds), None)
        dys = [None if dy is None else (dy if shape is None else as_matrix(dy)).contiguous() for dy in dys]
        with nullcontext() if backend is None else use_backend(backend):
            dx, grads = _backward(kinds, runs, sizes, calls, dys, saved)
        if dx is not None and shape is not None:
            dx = dx.view(*shape)
        dbs = [dy.sum(0) if kind[2].bias and dy is not None else None for dy, kind in zip(dys, kinds, strict=True)]
        return None, None, None, None, dx, *dbs, *grads


def _backward(kinds: list[Kind], runs, sizes, calls, dys, saved: tuple) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx of all layers, and the gradients of their tensors one after another."""
    dx, grads, at = None, [()] * len(kinds), 0
    for run, lengths in zip(runs, sizes, strict=True):
        kept = []
        for length in lengths:
            kept.append(saved[at : at + length])
            at += length
        delta = kinds[run[0]][0][1]
        dx, found = delta.backward_all([calls[i] for i in run], [dys[i] for i in run], kept, dx)
        for i, (dws, dps) in zip(run, found, strict=True):
            grads[i] = *dws, *dps
    return dx, [g for own in grads for g in own]


_apply = applied(GroupFunction)
