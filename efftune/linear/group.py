"""Layers that read one tensor work as one: the first of them that is called computes what all of them give.

For each layer alone, x is read for a thin product, dx is made and then summed up by autograd, and the input is kept.
For all of them together a delta multiplies by what the layers add side by side (`Delta.forward_all`), and dx is
accumulated in place.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from efftune.errors import refuse_second_derivative
from efftune.hooks import HOOKS
from efftune.linear.contracts import Call, Need, Stored
from efftune.linear.function import applied, as_matrix, new
from efftune.linear.handle import Source, flatten, reshaped, source_of, unflatten
from efftune.linear.module import Linear, Operands
from efftune.ops._op import forced_backend, use_backend

State = tuple[list, Need, list[int]]  # axes and tensors, which gradients are asked for, versions of the tensors


class Group:
    """Layers that are expected to read one tensor in a forward pass that is under way.

    The first that is called computes what all of them give that can be computed now. Each of the others fetches its own
    if it is called with the same tensor, unchanged, and works with what it worked with then. Else it computes alone, as
    it does under torch.compile, where autocast casts, and where it has hooks, draws or has another dtype. Whether
    gradients are recorded makes no difference: a block that is run again in backward gives the same bits.
    """

    __slots__ = ("hooks", "layers", "results", "version", "x")

    def __init__(self, layers: list[Linear]):
        self.layers, self.hooks = layers, _saved_tensor_hooks()
        self.x: Tensor | None = None
        self.version = 0
        self.results: dict[Linear, tuple[Tensor, State]] | None = None  # None: nobody has been called

    def output(self, layer: Linear, x: Tensor) -> Tensor | None:
        """What `layer` gives for x, or None: it computes alone."""
        first, self.results = self.results is None, self.results or {}  # one attempt in each forward pass
        if is_compiling() or x.is_inference():
            return None
        # torch's checkpointing calls a part of a forward pass again, and wants as many tensors to be saved as before.
        if _saved_tensor_hooks() != self.hooks:
            return None
        if first:
            return self._compute(layer, x)
        if x is not self.x or x._version != self.version or layer not in self.results:
            return None
        y, then = self.results.pop(layer)
        if not self.results:
            self.x = None
        return y if _same(_state(layer.operands(x, layer.stored())), then) else None

    def _compute(self, layer: Linear, x: Tensor) -> Tensor | None:
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            return None
        if _operands(layer, x) is None:
            return None
        members = {other: found for other in self.layers if (found := _operands(other, x)) is not None}
        if len(members) < 2:
            return None
        found = members.values()
        biases = [b if b is None or b.dtype == x.dtype else b.to(x.dtype) for b in (m.bias for m in found)]
        tensors = [t for m in found for t in (*m.w.tensors, *m.p)]
        kinds = tuple([(m.axes, (m.w.shape, m.w.dtype), m.need) for m in found])
        ys = dict(zip(members, _apply(kinds, forced_backend(), source_of(x), x, *biases, *tensors), strict=True))
        y = ys.pop(layer)
        self.x, self.version = x, x._version
        self.results = {other: (result, _state(members[other])) for other, result in ys.items()}
        return y


def _state(operands: Operands) -> State:
    axes, w, p, bias, need = operands
    tensors = [*w.tensors, *p]
    if bias is not None:
        tensors.append(bias)
    return [*axes, *tensors], need, [t._version for t in tensors]


def _same(now: State, then: State) -> bool:
    return now[1:] == then[1:] and len(now[0]) == len(then[0]) and all(map(operator.is_, now[0], then[0]))


def _operands(layer: Linear, x: Tensor) -> Operands | None:
    """What the layer would work with; None if it has to be called for that."""
    # Hooks may change x, or the layer's own weights for the time of its call.
    if any(getattr(layer, kind) for kind in HOOKS) or "forward" in vars(layer):
        return None
    w = layer.stored()
    if x.dtype != w.dtype or x.shape[-1] != layer.in_features:
        return None
    found = layer.operands(x, w)
    _, delta, keep = found.axes
    # What draws takes its seeds from a generator, in the order in which layers are called.
    if delta.random or keep.random or not layer.may_train(found.need):
        return None
    return found


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _runs(kinds: tuple) -> list[list[int]]:
    """The layers that have one delta and one keep, by their places."""
    runs: dict[Any, list[int]] = {}
    for i, ((_, delta, keep), _, _) in enumerate(kinds):
        runs.setdefault((delta, keep), []).append(i)
    return list(runs.values())


def _calls(kinds: tuple, tensors, biases, source: Source | None) -> list[Call]:
    calls, at = [], 0
    for ((base, _, keep), what, need), bias in zip(kinds, biases, strict=True):
        p = at + len(need.w)
        w = new(Stored, (tuple(tensors[at:p]), *what))
        at = p + len(need.p)
        calls.append(new(Call, (base, keep, w, tuple(tensors[p:at]), bias, None, need, source)))
    return calls


class GroupFunction(torch.autograd.Function):
    """As `LinearFunction`, for several layers of one x. What it saves is what they would, and the input once."""

    @staticmethod
    def forward(ctx, kinds: tuple, backend, source, x, *flat):
        ctx.set_materialize_grads(False)  # what nobody uses has no gradient
        rows, shape = as_matrix(x), x.shape
        biases, tensors = flat[: len(kinds)], flat[len(kinds) :]
        calls, ys, saved, sizes = _calls(kinds, tensors, biases, source), {}, [], []
        for run in _runs(kinds):
            delta = kinds[run[0]][0][1]
            outputs, kept = delta.forward_all([calls[i] for i in run], rows)
            ys |= zip(run, outputs, strict=True)
            saved += [part for parts in kept for part in parts]
            sizes.append([len(parts) for parts in kept])
        saved, structure = flatten(tuple(saved))
        ctx.save_for_backward(*tensors, *saved)
        ctx.call = kinds, sizes, structure, backend, len(tensors), shape
        results = [reshaped(ys[i], (*shape[:-1], ys[i].shape[-1])) for i in range(len(kinds))]
        ctx.mark_non_differentiable(*[y for y, (_, _, need) in zip(results, kinds, strict=True) if not need.any()])
        return tuple(results)

    @staticmethod
    def backward(ctx, *dys):
        refuse_second_derivative("efftune.Linear")
        kinds, sizes, structure, backend, num_tensors, shape = ctx.call
        tensors = ctx.saved_tensors
        saved = iter(unflatten(tensors[num_tensors:], structure))
        calls = _calls(kinds, tensors, [None] * len(kinds), None)
        dys = [None if dy is None else as_matrix(dy).contiguous() for dy in dys]
        dx, grads = None, {}
        with use_backend(backend or forced_backend()):
            for run, lengths in zip(_runs(kinds), sizes, strict=True):
                kept = [tuple([next(saved) for _ in range(length)]) for length in lengths]
                delta, own = kinds[run[0]][0][1], [calls[i] for i in run]
                dx, found = delta.backward_all(own, [dys[i] for i in run], kept, dx)
                grads |= zip(run, found, strict=True)
        if dx is not None:
            dx = dx.view(*shape)
        dbs = [dy.sum(0) if dy is not None and kind[2].bias else None for dy, kind in zip(dys, kinds, strict=True)]
        return None, None, None, dx, *dbs, *[g for i in range(len(kinds)) for part in grads[i] for g in part]


_apply = applied(GroupFunction)
