"""The sparse file: which entries or columns of each weight were trained, and what they became.

`sparse.safetensors` has, for a layer NAME, tensors

    NAME.entries.gaps (uint8), NAME.entries.values: the entries that train, sorted by their places n·K + k
    NAME.left.gaps, NAME.left.values: those that were trained and have left the picks, where there are any
    NAME.columns.gaps, NAME.columns.values (N, S): columns, of layers of which columns train

and in its metadata, under "layers", a JSON object NAME -> {"shape": [N, K], "dtype", "sha256"}: of W, its dtype, and of
the original weights at these places, in this order, as bytes. A gap is the number of places that are left out before
the next one, less than 255 a byte; 255 says that the gap goes on. Values are the trained weights in W's dtype: 3 bytes
an entry of a 16-bit W at densities of 1 % and more. Where these would not give the same bits again (W in 32 or 64 bits,
or weights far smaller than they were), they are the differences from the original weights, in float32 (float64).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.files import read_tensors, refuse_pickle
from efftune.linear import Linear, NoDelta
from efftune.linear.delta.columns import Columns
from efftune.linear.delta.entries import Entries
from efftune.linear.picks import columns_of, entries_of
from efftune.structure import is_linear

FILE = "sparse.safetensors"
GOES_ON = 255


def gaps(places: Tensor) -> Tensor:
    """Sorted, distinct places (S,) -> the bytes between them, uint8."""
    places = places.long()
    between = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    ends = (between // GOES_ON + 1).cumsum(0) - 1
    data = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), GOES_ON, dtype=torch.uint8, device=places.device)
    data[ends] = (between % GOES_ON).to(torch.uint8)
    return data


def places(data: Tensor) -> Tensor:
    """What `gaps` gave -> the places (S,) int64. Raises: ValueError for bytes that end within a gap."""
    if data.dtype != torch.uint8 or data.ndim != 1 or (len(data) and int(data[-1]) == GOES_ON):
        raise ValueError("its gaps are cut")
    ends = data != GOES_ON
    return data.long().cumsum(0)[ends] + torch.arange(int(ends.sum()))


def _at(layer: Linear, kind: str, where: Tensor) -> Tensor:
    """The weights that are stored at these places, on the CPU: (S,), or (N, S) of columns."""
    w = layer.take_back()
    rows, where = layer.base.rows(w, 0, w.shape[0], w.dtype).detach(), where.to(w.tensors[0].device)
    return (rows[:, where] if kind == "columns" else rows.reshape(-1)[where]).cpu()


def _hash(*originals: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in originals:
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _as_values(original: Tensor, change: Tensor) -> Tensor:
    """What a file has of weights that are round(original + change)."""
    trained = (original + change).to(original.dtype)
    again = (original + (trained.to(change.dtype) - original)).to(original.dtype)
    return trained if original.element_size() == 2 and torch.equal(again, trained) else change


def _as_change(original: Tensor, values: Tensor) -> Tensor:
    if values.dtype == original.dtype and original.element_size() == 2:
        return values.float() - original
    return values


def _change(layer: Linear, parts: dict[str, Tensor]) -> Tensor:
    original, values = parts["original"], parts["values"]
    return layer.delta.change_of(original, values) if isinstance(layer.delta, Entries) else values


class Sparse:
    name, file = "sparse", FILE
    reader: str | None = None

    def _layers(self, tuned) -> dict[str, Linear]:
        named = tuned.model.named_modules()
        return {n: m for n, m in named if (entries_of(m) or columns_of(m)) and not m.values.is_meta}

    def carries(self, tuned):
        return {f"{name}.{part}" for name, layer in self._layers(tuned).items() for part in layer.delta.names}

    def write(self, tuned, names, path):
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for name, layer in self._layers(tuned).items():
            parts = dict(zip(layer.delta.names, [t.detach().cpu() for t in layer.added()], strict=True))
            picked = "columns" if isinstance(layer.delta, Columns) else "entries"
            tensors[f"{name}.{picked}.gaps"] = gaps(parts["columns" if "columns" in parts else "indices"])
            tensors[f"{name}.{picked}.values"] = _as_values(parts["original"], _change(layer, parts)).contiguous()
            hashed = [parts["original"]]
            if len(parts.get("left", ())):
                tensors[f"{name}.left.gaps"] = gaps(parts["left"])
                tensors[f"{name}.left.values"] = parts["left_values"]
                hashed.append(parts["left_original"])
            dtype = str(parts["original"].dtype).removeprefix("torch.")
            about[name] = {"shape": [layer.out_features, layer.in_features], "dtype": dtype, "sha256": _hash(*hashed)}
        save_file(tensors, path / FILE, metadata={"format": "pt", "layers": json.dumps(about, sort_keys=True)})

    def read(self, tuned, path):
        file, layers, tensors = path / FILE, self._layers(tuned), {}
        about, held = _read(file)
        if about.keys() != layers.keys():
            first = sorted(about.keys() ^ layers.keys())[0]
            raise EfftuneError(f"{file} and the recipe do not train the same layers (first at {first}).")
        for name, layer in layers.items():
            parts = _parts(file, name, layer, about[name], held)
            kind = "columns" if isinstance(layer.delta, Columns) else "entries"
            if kind not in parts:
                raise EfftuneError(f"{file}: {name}: it has no {kind}; nothing was loaded.")
            where, original, values = parts[kind]
            found = {"original": original, "values": _as_change(original, values)}
            if isinstance(layer.delta, Entries):
                found["values"] = layer.delta.values_of(original, found["values"])
            if kind == "columns":
                found["columns"] = where.int()
            else:
                left, left_original, left_values = parts.get("left", (where[:0], original[:0], original[:0]))
                found |= {"indices": where.int(), "left": left.int(), "left_original": left_original}
                found["left_values"] = left_values
            tensors |= {f"{name}.{part}": tensor for part, tensor in found.items()}
        return tensors


@torch.no_grad()
def compose(model: nn.Module, add: Iterable[str | Path], subtract: Iterable[str | Path] = ()) -> nn.Module:
    """Adds to the weights of `model`, in place, what runs with sparse deltas trained: W₀ + Σ (Wᵢ - W₀), and subtracts
    what others did. The order of the folders changes nothing.

    Args:
        model: the model that the runs began with.   add, subtract: folders that `Tuner.save` has written.
    Numerics: summed up in float64 and rounded once to W's dtype.
    Raises: EfftuneError, before anything is changed, for a folder that has more than a sparse delta, and for weights
        that the runs did not begin with.
    """
    signs = [(Path(path) / FILE, sign) for paths, sign in ((add, 1), (subtract, -1)) for path in paths]
    changes: dict[str, list[tuple[Tensor, Tensor]]] = {}
    layers: dict[str, Linear] = {}
    for file, sign in sorted(signs, key=lambda item: (_digest(item[0]), item[1])):
        about, held = _read(file)
        for name in about:
            if name not in layers:
                layers[name] = _plain(model, name, file)
            k = layers[name].in_features
            for kind, (where, original, values) in _parts(file, name, layers[name], about[name], held).items():
                change = _as_change(original, values) if kind != "left" else values.double() - original
                if kind == "columns":
                    where = torch.arange(layers[name].out_features)[:, None] * k + where
                changes.setdefault(name, []).append((where.flatten(), sign * change.double().flatten()))
    for name, parts in changes.items():
        layer, every = layers[name], torch.cat([where for where, _ in parts]).unique()
        total = torch.zeros(len(every), dtype=torch.float64)
        for where, change in parts:
            total.index_add_(0, torch.searchsorted(every, where), change)
        w = layer.stored()
        device = w.tensors[0].device
        layer.base.put(w, every.to(device), (_at(layer, "entries", every) + total).to(device))
    return model


def _digest(file: Path) -> str:
    """Of its content. Raises: EfftuneError where something lies beside it that it says nothing of."""
    refuse_pickle(file)
    if not file.exists():
        raise EfftuneError(f"There is no {file}; give a folder that a recipe like shira, lift or s2ft was saved to.")
    beside = sorted(other.name for other in file.parent.glob("*.safetensors") if other != file)
    if beside:
        raise EfftuneError(f"{file.parent} holds {', '.join(beside)} as well, of which no sum can be made.")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _plain(model: nn.Module, name: str, file: Path) -> Linear:
    """A view of a linear layer of the model."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise EfftuneError(f"{file} has the layer {name}, which {type(model).__name__} has not.") from None
    if not is_linear(module) or isinstance(module, Linear):
        raise EfftuneError(f"{name} is a {type(module).__name__}; compose deltas on the model as it is loaded.")
    return Linear.from_linear(module, delta=NoDelta())


KINDS = "entries", "left", "columns"
Parts = dict[str, tuple[Tensor, Tensor, Tensor]]  # kind -> places, the original weights there, and what the file has


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import safe_open

    refuse_pickle(file)
    tensors = read_tensors(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    try:
        about = json.loads(metadata["layers"])
        if not isinstance(about, dict):
            raise ValueError
    except (KeyError, ValueError):
        raise EfftuneError(
            f"{file} does not say which layers it has: it was altered; save or fetch it again."
        ) from None
    return about, tensors


def _parts(file: Path, name: str, layer: Linear, about: dict[str, Any], held: dict[str, Tensor]) -> Parts:
    """What the file has of a layer. Raises: EfftuneError where it is damaged or of another weight."""
    try:
        return _checked(
            layer, about, {kind: (held.get(f"{name}.{kind}.gaps"), held.get(f"{name}.{kind}.values")) for kind in KINDS}
        )
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise EfftuneError(f"{file}: {name}: {error}; nothing was loaded.") from None


def _checked(layer: Linear, about: dict[str, Any], held: dict[str, tuple[Tensor | None, Tensor | None]]) -> Parts:
    n, k = shape = (layer.out_features, layer.in_features)
    if tuple(about["shape"]) != shape:
        raise ValueError(f"it was saved of a weight of {tuple(about['shape'])}, and this one is {shape}")
    dtype, parts, originals = layer.stored().dtype, Parts(), list[Tensor]()
    if about["dtype"] != str(dtype).removeprefix("torch."):
        raise ValueError(f"it is of weights in {about['dtype']}, and these are {dtype}; load them in that dtype")
    for kind, (data, values) in held.items():
        if data is None or values is None:
            continue
        where = places(data)
        if len(where) and int(where[-1]) >= (k if kind == "columns" else n * k):
            raise ValueError(f"place {int(where[-1])} is outside of a weight of {shape}")
        originals.append(_at(layer, kind, where))
        if values.shape != originals[-1].shape:
            raise ValueError(f"{tuple(values.shape)} values are not those of {len(where)} {kind}")
        if not values.isfinite().all():
            raise ValueError("it has NaN or Inf")
        parts[kind] = where, originals[-1], values
    if parts.keys() <= {"left"}:
        raise ValueError("it has no entries and no columns")
    if about["sha256"] != _hash(*originals):
        raise ValueError("it was trained on other weights than these; load the model that the run began with")
    return parts
