"""The sparse file: which entries or columns of each weight were trained, and what they became.

`sparse.safetensors` has, for a layer NAME, tensors

    NAME.entries.gaps (uint8), NAME.entries.values: the entries that train, sorted by their places n·K + k
    NAME.left.gaps, NAME.left.values: those that were trained and have left the picks, where there are any
    NAME.left_changes.gaps, .values: the same of a weight that is never written to, as differences from it
    NAME.columns.gaps, NAME.columns.values (N, S): columns, of layers of which columns train
    NAME.entries.signs (uint8, eight to a byte), NAME.entries.scale (1): in place of values, where all changes are of
        one size, as `changes.ternary` leaves them

and in its metadata, under "layers", a JSON object NAME -> {"shape": [N, K], "dtype", "sha256"}: of W, its dtype, and of
the original weights at these places, in this order, as bytes. A gap is the number of places that are left out before
the next one, less than 255 a byte; 255 says that the gap goes on. Values are the trained weights in W's dtype: 3 bytes
an entry of a 16-bit W at densities of 1 % and more. Where these would not give the same bits again (W in 32 or 64 bits,
or weights far smaller than they were), they are the differences from the original weights, in float32 (float64).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.files import read_tensors, refuse_pickle
from efftune.linear import Linear, NoDelta
from efftune.linear.delta.columns import Columns, above
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


def at(layer: Linear, kind: str, where: Tensor) -> Tensor:
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


def _signs(change: Tensor) -> tuple[Tensor, Tensor] | None:
    """The signs of changes as bits, and their size, if they have but one."""
    scale = change[:1].abs()
    if not len(change) or not scale or not change.abs().eq(scale).all():
        return None
    return torch.from_numpy(np.packbits(change.gt(0).cpu().numpy())), scale.cpu()


def _of_signs(signs: Tensor, scale: Tensor, count: int) -> Tensor:
    if (
        signs.dtype != torch.uint8
        or signs.shape != (-(-count // 8),)
        or scale.shape != (1,)
        or scale.dtype == torch.bool
    ):
        raise ValueError(f"its signs are not those of {count} entries")
    return torch.from_numpy(np.unpackbits(signs.numpy(), count=count)).to(scale.dtype).mul_(2).sub_(1).mul_(scale)


KINDS = "entries", "left", "left_changes", "columns"
Parts = dict[str, tuple[Tensor, Tensor, Tensor]]  # kind -> places, the original weights there, and what a file has


class Changes(NamedTuple):
    """What became of the entries of a weight that trained."""

    layer: Linear
    where: Tensor  # (S,) int64, n·K + k for W[n, k], sorted
    original: Tensor  # (S,) in W's dtype
    change: Tensor  # (S,) float64

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features


def trained(tuned) -> dict[str, Linear]:
    """The layers of which entries or columns train, by name, whose weights have data."""
    named = tuned.model.named_modules()
    return {n: m for n, m in named if (entries_of(m) or columns_of(m)) and not m.values.is_meta}


def parts_of(layer: Linear) -> Parts:
    """What a file would have of a layer of which entries or columns train, on the CPU; all changes as such."""
    p = dict(zip(layer.delta.names, [t.detach().cpu() for t in layer.added()], strict=True))

    def part(kind: str, where: str, original: str, values: str) -> tuple[Tensor, Tensor, Tensor]:
        places = p[where].long()
        return places, p[original] if original in p else at(layer, kind, places), p[values]

    if isinstance(layer.delta, Columns):
        return {"columns": part("columns", "columns", "original", "values")}
    where, original, values = part("entries", "indices", "original", "values")
    parts = {"entries": (where, original, cast(Entries, layer.delta).change_of(original, values))}
    if len(p["left"]):
        kind = "left" if layer.delta.in_place else "left_changes"
        parts[kind] = part(kind, "left", "left_original", "left_values")
    return parts


def entries_as(
    layer: Linear, where: Tensor, change: Tensor, left: Tensor | None = None, left_change: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of the layer's delta, by their names, where these entries have changed so, sorted, and others that
    have left the picks."""
    left = where[:0] if left is None else left
    left_change = change[:0] if left_change is None else left_change
    found = {"indices": where.int(), "values": change, "left": left.int()}
    if not layer.delta.in_place:
        return found | {"left_values": left_change}
    original, left_original = at(layer, "entries", where), at(layer, "entries", left)
    found["values"] = cast(Entries, layer.delta).values_of(original, change)
    left_values = (left_original + left_change).to(left_original.dtype)
    return found | {"original": original, "left_original": left_original, "left_values": left_values}


def columns_as(layer: Linear, columns: Tensor, change: Tensor) -> dict[str, Tensor]:
    """The tensors of the layer's delta, by their names, where these columns have changed so, sorted."""
    original = {"original": at(layer, "columns", columns)} if layer.delta.in_place else {}
    return {"columns": columns.int(), "values": change, **original}


def flat(layer: Linear, parts: Parts) -> Changes:
    """All of them as entries."""
    found = []
    for kind, (where, original, values) in parts.items():
        change = values.double() - original if kind == "left" else _as_change(original, values).double()
        if kind == "columns":
            where = torch.arange(layer.out_features)[:, None] * layer.in_features + where
        found.append((where.flatten(), original.flatten(), change.flatten()))
    where, original, change = (torch.cat(part) for part in zip(*found, strict=True))
    order = where.argsort()
    return Changes(layer, where[order], original[order], change[order])


class Sparse:
    name, file = "sparse", FILE
    reader: str | None = None

    def carries(self, tuned):
        return {f"{name}.{part}" for name, layer in trained(tuned).items() for part in layer.delta.names}

    def write(self, tuned, names, path):
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for name, layer in trained(tuned).items():
            parts = parts_of(layer)
            for kind, (where, original, values) in parts.items():
                key = f"{name}.{kind}"
                tensors[f"{key}.gaps"] = gaps(where)
                if kind == "entries" and (packed := _signs(values)) is not None:
                    tensors[f"{key}.signs"], tensors[f"{key}.scale"] = packed
                else:
                    if layer.delta.in_place and kind != "left":
                        values = _as_values(original, values)
                    tensors[f"{key}.values"] = values.contiguous()
            about[name] = about_layer(layer, parts)
        save_file(tensors, path / FILE, metadata={"format": "pt", "layers": json.dumps(about, sort_keys=True)})

    def read(self, tuned, path):
        file, layers, tensors = path / FILE, trained(tuned), {}
        about, held = _read(file)
        if about.keys() != layers.keys():
            first = sorted(about.keys() ^ layers.keys())[0]
            raise EfftuneError(
                f"{file} and the recipe do not train the same layers (first at {first}); "
                "load the model and the recipe that it was saved with."
            )
        for name, layer in layers.items():
            parts = _parts(file, name, layer, about[name], held)
            kind = "columns" if isinstance(layer.delta, Columns) else "entries"
            if kind not in parts:
                raise EfftuneError(f"{file}: {name}: it has no {kind}; nothing was loaded.")
            where, original, values = parts[kind]
            change = _as_change(original, values)
            if kind == "columns":
                found = columns_as(layer, where, change)
            else:
                weights, changes = parts.get("left"), parts.get("left_changes")
                if weights is not None:
                    changes = *weights[:2], (weights[2].double() - weights[1]).to(change.dtype)
                found = entries_as(layer, where, change, *(changes[::2] if changes else ()))
                if weights is not None and layer.delta.in_place:
                    found["left_values"] = weights[2]  # to the bit
            tensors |= {f"{name}.{part}": tensor for part, tensor in found.items()}
        return tensors


def about_layer(layer: Linear, parts: Parts) -> dict[str, Any]:
    """What a file says about a weight: it fits no other one."""
    originals = [original for _, original, _ in parts.values()]
    dtype = str(originals[0].dtype).removeprefix("torch.")
    about = {"shape": [layer.out_features, layer.in_features], "dtype": dtype, "sha256": _hash(*originals)}
    return about if layer.base.trains else about | {"base": str(layer.base)}


def read_changes(model: nn.Module, file: Path) -> dict[str, Changes]:
    """What a file says of the layers of `model`, as it was loaded. Raises: EfftuneError where it does not fit."""
    about, held = _read(file)
    layers = {name: _plain(model, name, file) for name in about}
    return {name: flat(layer, _parts(file, name, layer, about[name], held)) for name, layer in layers.items()}


def dtypes(file: Path) -> set[str]:
    """Of the weights that a file is of."""
    return {str(about.get("dtype")) for about in _read(file)[0].values() if isinstance(about, dict)}


def _plain(model: nn.Module, name: str, file: Path) -> Linear:
    """A view of a linear layer of the model."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise EfftuneError(f"{file} has the layer {name}, which {type(model).__name__} has not.") from None
    if not is_linear(module) or isinstance(module, Linear):
        raise EfftuneError(f"{name} is a {type(module).__name__}; compose deltas on the model as it is loaded.")
    return Linear.from_linear(module, delta=NoDelta())


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    refuse_pickle(file)
    tensors = read_tensors(file)
    try:
        about = json.loads(metadata(file)["layers"])
        if not isinstance(about, dict):
            raise ValueError
    except (KeyError, ValueError):
        raise EfftuneError(
            f"{file} does not say which layers it has: it was altered; save or fetch it again."
        ) from None
    return about, tensors


def metadata(file: Path) -> dict[str, str]:
    """Of a safetensors file that could be read."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def _parts(file: Path, name: str, layer: Linear, about: dict[str, Any], held: dict[str, Tensor]) -> Parts:
    """What the file has of a layer. Raises: EfftuneError where it is damaged or of another weight."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): tensor for key, tensor in held.items() if key.startswith(prefix)}
    try:
        return _checked(layer, about, own)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise EfftuneError(f"{file}: {name}: {error}; nothing was loaded.") from None


def check_weight(layer: Linear, about: dict[str, Any]) -> None:
    """Raises: ValueError where a file is of a weight of another shape or dtype."""
    shape, dtype = (layer.out_features, layer.in_features), layer.stored().dtype
    if tuple(about["shape"]) != shape:
        raise ValueError(f"it was saved of a weight of {tuple(about['shape'])}, and this one is {shape}")
    if about["dtype"] != str(dtype).removeprefix("torch."):
        raise ValueError(f"it is of weights in {about['dtype']}, and these are {dtype}; load them in that dtype")
    base, own = about.get("base"), None if layer.base.trains else str(layer.base)
    if base != own:
        kinds = [kind or "a dense weight" for kind in (base, own)]
        raise ValueError(
            f"it was trained over {kinds[0]}, and this is {kinds[1]}; merge the run, or load it by its recipe"
        )


def check_original(about: dict[str, Any], originals: list[Tensor]) -> None:
    """Raises: ValueError where a file was made of other weights."""
    if about["sha256"] != _hash(*originals):
        raise ValueError("it was trained on other weights than these; load the model that the run began with")


def _checked(layer: Linear, about: dict[str, Any], held: dict[str, Tensor]) -> Parts:
    check_weight(layer, about)
    n, k = shape = (layer.out_features, layer.in_features)
    dtype, parts = layer.stored().dtype, Parts()
    for kind in KINDS:
        data, values = held.get(f"{kind}.gaps"), held.get(f"{kind}.values")
        signs, scale = held.get(f"{kind}.signs"), held.get(f"{kind}.scale")
        if data is None or (values is None and (signs is None or scale is None)):
            continue
        where = places(data)
        if len(where) and int(where[-1]) >= (k if kind == "columns" else n * k):
            raise ValueError(f"place {int(where[-1])} is outside of a weight of {shape}")
        if values is None:
            values = _of_signs(cast(Tensor, signs), cast(Tensor, scale), len(where))
        original = at(layer, kind, where)
        if values.shape != original.shape:
            raise ValueError(f"{tuple(values.shape)} values are not those of {len(where)} {kind}")
        if values.dtype not in (dtype, above(dtype)):
            raise ValueError(f"its values are {values.dtype}, which is none of {dtype} and {above(dtype)}")
        if not values.isfinite().all():
            raise ValueError("it has NaN or Inf")
        parts[kind] = where, original, values
    if parts.keys() <= {"left", "left_changes"}:
        raise ValueError("it has no entries and no columns")
    if "left" in parts and torch.isin(parts["left"][0], parts.get("entries", parts["left"])[0]).any():
        raise ValueError("an entry is in it twice")
    check_original(about, [original for _, original, _ in parts.values()])
    return parts
