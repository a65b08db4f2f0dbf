"""Which entries or columns of a layer train: what a recipe decides, and may decide anew."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from efftune.linear.delta.columns import Columns, above
from efftune.linear.delta.entries import Entries
from efftune.linear.module import Linear
from efftune.ops.entries_grad import check_indices


def entries_of(module: Any) -> bool:
    """Whether it is a layer of which entries train."""
    return isinstance(module, Linear) and isinstance(module.delta, Entries)


def columns_of(module: Any) -> bool:
    """Whether it is a layer of which columns train."""
    return isinstance(module, Linear) and isinstance(module.delta, Columns)


@torch.no_grad()
def repick(layer: Linear, picks: Tensor, forget: bool = False) -> Tensor:
    """Lets other entries of the layer train; what they learn starts anew, or from the weights they were left with.

    Args:
        picks: (S,) integers, sorted and distinct.   forget: entries that leave the picks become what they were.
    Returns: for each pick the place that it had among the old ones, int64, or -1: where the optimizer's state of it is.
    """
    check_indices(picks, (layer.out_features, layer.in_features))
    picks = picks.to(device=layer.indices.device, dtype=torch.int32)
    delta, p = cast(Entries, layer.delta), dict(zip(layer.delta.names, layer.added(), strict=True))
    old, values, left, left_values = p["indices"], p["values"], p["left"], p["left_values"]
    known, order = torch.cat([old, left]).sort()  # all that ever trained
    at, gone = _find(known, picks), (_find(picks, known) < 0) & (not forget)

    def learnt(left_values: Tensor, begin: Tensor) -> Tensor:
        return torch.where(at >= 0, torch.cat([values, left_values])[order][at], begin) if len(known) else begin

    if delta.in_place:
        original, left_original = p["original"], p["left_original"]
        last = torch.cat([(original + delta.change_of(original, values)).to(original.dtype), left_values])[order]
        w = layer.take_back()
        plain = layer.base.rows(w, 0, w.shape[0], w.dtype).flatten()
        gone &= last != plain[known]  # what has not changed need not be remembered
        again = delta.values_of(left_original, left_values.to(values.dtype) - left_original)
        begin = delta.values_of(plain[picks], torch.zeros_like(plain[picks], dtype=values.dtype))
        made = picks, plain[picks], learnt(again, begin), known[gone], plain[known[gone]], last[gone]
    else:
        last = torch.cat([values, left_values])[order]
        gone &= last != 0
        made = picks, learnt(left_values, values.new_zeros(len(picks))), known[gone], last[gone]
    place = _find(old, picks)
    layer.replace(made)
    layer.values.grad = None  # of the old ones, and as many as they were
    return place


@torch.no_grad()
def choose(layer: Linear, columns: Tensor) -> None:
    """Lets these columns of the layer train, (S,) integers, sorted and distinct, from W as it was stored."""
    check_indices(columns, (1, layer.in_features))
    columns = columns.to(device=layer.columns.device, dtype=torch.int32)
    if not layer.delta.in_place:
        layer.replace((columns, torch.zeros_like(layer.values)))
        return
    w = layer.take_back()
    step = max(1, 2**22 // layer.in_features)
    tiles = [layer.base.rows(w, a, min(a + step, w.shape[0]), w.dtype) for a in range(0, w.shape[0], step)]
    original = torch.cat([tile.index_select(1, columns) for tile in tiles])
    layer.replace((columns, original, torch.zeros_like(original, dtype=above(w.dtype))))


def _find(where: Tensor, what: Tensor) -> Tensor:
    """The place of each of `what` in `where`, which is sorted, or -1; int64."""
    if not len(where):
        return torch.full_like(what, -1, dtype=torch.int64)
    at = torch.searchsorted(where, what).clamp(max=len(where) - 1)
    return torch.where(where[at] == what, at, -1)
