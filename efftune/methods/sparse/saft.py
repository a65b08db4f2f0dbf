"""SAFT: the entries of the whole model with the largest gradients train."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efftune.methods.sparse._scores import at, largest
from efftune.methods.sparse._sparse import Sparse
from efftune.methods.sparse._watch import finite_gradient, gradients


@dataclass(frozen=True)
class Saft(Sparse):
    """Trains the entries with the largest gradients of the first micro-batch, picked among all linear layers at once.

    Args:
        density: the share of all entries of these layers that train. A layer may get many, and gets one at least.
        scorer, rank, seed: of the picks before the first micro-batch.   target_modules, modules_to_save: see `lora`.
    Source: Nguyen et al. 2024, arXiv:2407.03036.
    """

    density: float = 0.001
    scorer: str = "gradient"

    name = "saft"

    def look(self, micro):
        layers = self.layers(micro.run)
        count = sum(self.delta().count((layer.out_features, layer.in_features)) for layer in layers.values())
        names = list(layers)
        best: list[Tensor] = []  # scores, places of the layer among all, entries: of the `count` best so far

        def see(name: str, g: Tensor, z: Tensor) -> None:
            shape, rows = (g.shape[1], z.shape[1]), finite_gradient(g, z)
            found = largest(rows, shape, min(count, shape[0] * shape[1]))
            parts = [at(rows, shape, found), torch.full_like(found, names.index(name)), found]
            parts[0][parts[0].argmax()] = torch.inf  # no layer is left without
            best[:] = [torch.cat([old.to(new.device), new]) for old, new in zip(best, parts)] if best else parts
            keep = best[0].sort(descending=True, stable=True).indices[:count]
            best[:] = [part[keep] for part in best]

        gradients(micro, layers, see)
        for place, name in enumerate(names):
            picks = best[2][best[1] == place].sort().values
            self.take(micro.run, layers[name], picks if len(picks) else layers[name].indices[:1])  # it had no gradient
