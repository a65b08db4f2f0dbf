"""Forward passes with the weights w + eps·z, in scratch copies: the model's own weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from efftune.hooks import on_parameters
from efftune.optim.zeroth_order import ZerothOrderSGD

SMALL = 2**24  # bytes of weights that are perturbed together, whatever one module needs


class Perturbation:
    """Within it, and within `by`, every module computes with w + eps·z for those of its own parameters that train.

    A call costs the host a launch, however small its parameters are. So the members of a ModuleList (the blocks of a
    model), or parts of them, perturb all that is inside them in one call, as long as that is no larger than what one
    module needs anyway, or `SMALL`. A module perturbs what it holds when it is called and nobody around it has.
    """

    def __init__(self, model: nn.Module, optimizer: ZerothOrderSGD):
        self.model, self.directions = model, optimizer.directions
        self.names = {id(p): name for name, p in optimizer.named_parameters() if p.requires_grad}
        self.eps, self.seed = 0.0, 0
        self.stack: list[list[tuple[nn.Parameter, Tensor]]] = []  # clean tensors of the calls under way, innermost last
        self.dirty: set[int] = set()  # a parameter that nested modules share is perturbed by the outermost alone
        self.used: set[int] = set()
        self.handles: list[Any] = []

    def __enter__(self) -> Perturbation:
        modules = list(self.model.modules())
        trained = {m: found for m in modules if (found := self._trained(m))}
        most = max([SMALL, *(sum(p.nbytes for p in found) for found in trained.values())])
        inside: dict[nn.Module, dict[int, nn.Parameter]] = {m: {} for m in modules if m._parameters}
        for module in modules:
            for block in module if isinstance(module, nn.ModuleList) else ():
                inside.update(parts(block, trained, most) if block is not None else ())
        for module, parameters in inside.items():
            self._watch(module, parameters)
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def _trained(self, module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module._parameters.values() if p is not None and id(p) in self.names]

    def _watch(self, module: nn.Module, inside: dict[int, nn.Parameter]) -> None:
        stack, dirty, used, names = self.stack, self.dirty, self.used, self.names
        restores = False  # whether the module has the hook that does: most perturb nothing, inside a block that did

        @on_parameters
        def enter(module: nn.Module, args) -> None:
            nonlocal restores
            parameters = {id(p): p for p in self._trained(module)}  # a forward may have put another there since
            used.update(parameters)
            clean = {key: (p, p.data) for key, p in (inside | parameters).items() if key not in dirty}
            if clean and not restores:
                self.handles.append(module.register_forward_hook(leave, always_call=True))
                restores = True
            if restores:
                stack.append(list(clean.values()))
            if clean:
                w = [data for _, data in clean.values()]
                made = self.directions.perturbed([names[key] for key in clean], w, self.eps, self.seed)
                dirty.update(clean)
                for (p, _), data in zip(clean.values(), made, strict=True):
                    p.data = data

        @on_parameters
        def leave(module: nn.Module, args, output) -> None:
            for p, data in stack.pop():
                p.data = data
                dirty.discard(id(p))

        self.handles.append(module.register_forward_pre_hook(enter, prepend=True))

    @contextmanager
    def by(self, eps: float, seed: int) -> Iterator[set[int]]:
        """Yields the set of ids of the parameters that were used so."""
        self.eps, self.seed = eps, seed
        self.used.clear()
        torch.clear_autocast_cache()  # it knows casts by the parameter, whose data are others now
        try:
            yield self.used
        finally:
            torch.clear_autocast_cache()
            for p, data in (pair for call in reversed(self.stack) for pair in call):
                p.data = data  # after a KeyboardInterrupt torch calls no hook
            self.stack.clear()
            self.dirty.clear()


def parts(
    block: nn.Module, trained: dict[nn.Module, list[nn.Parameter]], most: int
) -> Iterator[tuple[nn.Module, dict[int, nn.Parameter]]]:
    """Yields the block, or the largest of its parts that are small enough, each with the parameters inside it."""
    inside = {id(p): p for m in block.modules() for p in trained.get(m, ())}
    if isinstance(block, nn.ModuleList | nn.ModuleDict) or sum(p.nbytes for p in inside.values()) > most:
        for child in block.children():  # a list is not called
            yield from parts(child, trained, most)
    elif len(inside) > 1:
        yield block, inside
