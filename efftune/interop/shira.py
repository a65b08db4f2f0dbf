"""SHiRA adapters of PEFT's: entries of weights as PEFT has them, read and written without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.files import read_tensors
from efftune.interop.peft import CONFIG, PREFIX, SHIRA, WEIGHTS, Layout, by_our_names, in_several_places
from efftune.interop.sparse import about_layer, at, check_original, check_weight, flat, metadata, parts_of, trained
from efftune.linear import Linear
from efftune.linear.delta.columns import Columns, above
from efftune.linear.delta.entries import Entries

ENTRIES = "efftune.entries"  # in the metadata of a file of ours: layer -> what it was


class Shira:
    """A PEFT adapter of SHiRA: the entries and columns that train, and modules that train whole.

    PEFT adds a matrix of r·(N + K) entries to each W, r the same for all layers. So entries that do not train go with
    them, as zeros, to the smallest r that all layers fit into. Layers have none in the file that PEFT cannot take:
    transformers' Conv1D, a module in several places, and one where r·(N + K) is more than N·K.

    Numerics: PEFT adds the changes in float32 (over a float64 W: float64) and rounds once to W's dtype, as we do, so
        that its weights are ours bit for bit. Of entries that have left the picks over a W of 32 or 64 bits, a
        difference is stored, and W is off by its rounding.
    """

    name, file = "shira", CONFIG
    reader: str | None = "PEFT"

    def carries(self, tuned):
        layout = _layout(tuned)
        if layout is None:
            return set()
        layers = trained(tuned)
        return {f"{name}.{part}" for name in layout.deltas for part in layers[name].delta.names} | {
            *layout.keys.values()
        }

    def write(self, tuned, names, path):
        """Keys: base_model.model.<path>.shira_weight (S,), .shira_indices (2, S) int32: rows and columns; first those
        that train, in the order of their places, then those that have left the picks, then the zeros."""
        layout, layers = _layout(tuned), trained(tuned)
        assert layout is not None  # else it carries nothing
        tensors, about = dict[str, Tensor](), dict[str, Any]()
        for name, delta in layout.deltas.items():
            layer, parts = layers[name], parts_of(layers[name])
            several = [flat(layer, {kind: part}) for kind, part in parts.items()]
            where = torch.cat([changes.where for changes in several])
            change = torch.cat([changes.change for changes in several]).to(above(several[0].original.dtype))
            zeros = delta.count((layer.out_features, layer.in_features)) - len(where)
            every = torch.arange(len(where) + zeros)
            padded = torch.cat([where, every[~torch.isin(every, where)][:zeros]])
            indices = torch.stack([padded // layer.in_features, padded % layer.in_features])
            tensors[f"{PREFIX}{name}.shira_indices"] = indices.int()
            tensors[f"{PREFIX}{name}.shira_weight"] = torch.cat([change, change.new_zeros(zeros)])
            counts = {kind: len(part[0]) for kind, part in parts.items()}
            about[name] = about_layer(layer, parts) | {"counts": counts}
        layout.write(tuned, names, path, tensors, **{ENTRIES: json.dumps(about, sort_keys=True)})

    def read(self, tuned, path):
        tensors, found = read_tensors(path / WEIGHTS), dict[str, Tensor]()
        about = _about(path / WEIGHTS)
        for name, layer in trained(tuned).items():
            key = f"{PREFIX}{name}.shira_"
            indices, change = tensors.pop(key + "indices", None), tensors.pop(key + "weight", None)
            if indices is None and change is None:
                continue  # `load` says that it is missing
            if indices is None or change is None:
                raise EfftuneError(f"{path / WEIGHTS}: {name}: it has no shira_indices or no shira_weight.")
            try:
                own = _of_layer(layer, indices, change, about.get(name))
            except (ValueError, TypeError, KeyError) as error:
                raise EfftuneError(f"{path / WEIGHTS}: {name}: {error}; nothing was loaded.") from None
            found |= {f"{name}.{part}": tensor for part, tensor in own.items()}
        layout = _layout(tuned)
        return found | by_our_names(tuned, {} if layout is None else layout.keys, tensors, path)


def _layout(tuned) -> Layout | None:
    """None where the model has no layers that PEFT could take."""
    shared, counts = in_several_places(tuned.model), dict[str, int]()
    layers = {n: m for n, m in trained(tuned).items() if m.conv1d is None and n not in shared}
    for name, layer in layers.items():
        p = dict(zip(layer.delta.names, layer.added(), strict=True))
        counts[name] = p["values"].numel() + len(p.get("left", ()))
    while layers:
        r = max(1, *(-(-counts[name] // sum(shape_of(layer))) for name, layer in layers.items()))
        fit = {n: m for n, m in layers.items() if r * sum(shape_of(m)) <= m.out_features * m.in_features}
        if len(fit) == len(layers):
            return Layout.around(tuned, SHIRA, dict.fromkeys(layers, Entries(r=r)))
        layers = fit
    return None


def shape_of(layer: Linear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _about(file: Path) -> dict[str, Any]:
    text = metadata(file).get(ENTRIES, "{}")
    try:
        about = json.loads(text)
    except ValueError:
        about = None
    if not isinstance(about, dict) or not all(isinstance(of, dict) for of in about.values()):
        raise EfftuneError(f"{file} does not say which entries it has: it was altered; save or fetch it again.")
    return about


def _of_layer(layer: Linear, indices: Tensor, change: Tensor, about: dict[str, Any] | None) -> dict[str, Tensor]:
    """The tensors of the layer's delta, by their names. Raises: ValueError where the file does not fit the layer."""
    n, k = shape_of(layer)
    if indices.dtype.is_complex or indices.ndim != 2 or indices.shape != (2, change.numel()) or change.ndim != 1:
        raise ValueError(f"indices {tuple(indices.shape)} and weights {tuple(change.shape)} are not of one adapter")
    if not change.is_floating_point() or not change.isfinite().all():
        raise ValueError("its weights are no finite numbers")
    rows, columns = indices.long()  # on Windows PEFT writes them as float32
    if len(change) and (int(indices.min()) < 0 or int(rows.max()) >= n or int(columns.max()) >= k):
        raise ValueError(f"an index is outside of a weight of {(n, k)}")
    where = rows * k + columns
    if len(where.unique()) != len(where):
        raise ValueError("an entry is in it twice")
    if about is None:  # PEFT's: all that it has trains
        where, order = where.sort()
        return _entries(layer, where, change[order], where[:0], change[:0])
    check_weight(layer, about)
    counts = {kind: int(about["counts"].get(kind, 0)) for kind in ("entries", "left", "columns")}
    if min(counts.values()) < 0 or sum(counts.values()) > len(where):
        raise ValueError("it has fewer entries than it says")
    if isinstance(layer.delta, Columns):
        picked = where[: counts["columns"] * n]
        chosen = picked[: counts["columns"]]
        original = at(layer, "columns", chosen)
        check_original(about, [original])
        return {"columns": chosen.int(), "original": original, "values": change[: len(picked)].view(n, -1)}
    picked, left = where.split([counts["entries"], counts["left"], len(where) - counts["entries"] - counts["left"]])[:2]
    found = _entries(layer, picked, change[: len(picked)], left, change[len(picked) :][: len(left)])
    check_original(about, [found["original"], *([found["left_original"]] if len(left) else [])])
    return found


def _entries(layer: Linear, where: Tensor, change: Tensor, left: Tensor, left_change: Tensor) -> dict[str, Tensor]:
    original, left_original = at(layer, "entries", where), at(layer, "entries", left)
    left_values = (left_original + left_change).to(left_original.dtype)
    return {
        "indices": where.int(), "original": original, "values": change,
        "left": left.int(), "left_original": left_original, "left_values": left_values,
    }  # fmt: skip
