"""What runs with sparse deltas changed, as vectors of the weights: thinned out, reduced to signs, added up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.files import ADAPTER, refuse_pickle
from efftune.interop.sparse import FILE, Changes, at, read_changes
from efftune.structure import parameter_names

Edit = Callable[[Changes], Changes]


def compose(
    model: nn.Module, add: Iterable[str | Path], subtract: Iterable[str | Path] = (), edit: Edit | None = None
) -> nn.Module:
    """Adds to the weights of `model`, in place, what runs with sparse deltas trained: W₀ + Σ (Wᵢ - W₀), and subtracts
    what others did. The order of the folders changes nothing.

    Args:
        model: the model that the runs began with.
        add, subtract: folders that `Tuner.save` has written, or of finished runs.
        edit: what each of them goes through first: `masked`, `ternary`, or a function of one's own.
    Numerics: summed up in float64 and rounded once to W's dtype.
    Raises: EfftuneError, before anything is changed, for a folder that has more than a sparse delta, for weights that
        the runs did not begin with, and for one that others read.
    """
    return put(model, total(model, add, subtract, edit))


@torch.no_grad()
def put(model: nn.Module, changes: dict[str, Changes]) -> nn.Module:
    """Adds to the weights of `model`, in place, what `total` gave of them, rounded once to W's dtype."""
    tied = parameter_names(model)
    for name, changed in changes.items():
        if len(shared := tied.get(id(changed.layer.stored().tensors[0]), [])) > 1:
            raise EfftuneError(
                f"{name} shares its weight ({', '.join(shared)}), which the run left as it was, and a sum would change "
                "the others too; write it as a sparse file, or load the adapter."
            )
    for layer, where, original, change in changes.values():
        w = layer.stored()
        device = w.tensors[0].device
        layer.base.put(w, where.to(device), (original + change).to(device))
    return model


def total(
    model: nn.Module, add: Iterable[str | Path], subtract: Iterable[str | Path] = (), edit: Edit | None = None
) -> dict[str, Changes]:
    """Σ (Wᵢ - W₀) of each layer that a folder has. See `compose`."""
    signs = [(file, sign) for paths, sign in ((add, 1), (subtract, -1)) for file in files(paths)]
    parts: dict[str, list[tuple[Changes, int]]] = {}
    for _, sign, file in sorted((hashlib.sha256(file.read_bytes()).hexdigest(), sign, file) for file, sign in signs):
        for name, changes in read_changes(model, file).items():
            parts.setdefault(name, []).append((changes if edit is None else edit(changes), sign))
    return {name: _sum(several) for name, several in parts.items()}


def _sum(parts: list[tuple[Changes, int]]) -> Changes:
    layer, every = parts[0][0].layer, torch.cat([changes.where for changes, _ in parts]).unique()
    change = torch.zeros(len(every), dtype=torch.float64)
    for changes, sign in parts:
        change.index_add_(0, torch.searchsorted(every, changes.where), sign * changes.change)
    return Changes(layer, every, at(layer, "entries", every), change)


def files(paths: Iterable[str | Path]) -> list[Path]:
    """The sparse files of these folders. Raises: EfftuneError where one has none, or more than that."""
    return [_file(Path(path)) for path in paths]


def _file(path: Path) -> Path:
    folder = path if (path / FILE).exists() or not (path / ADAPTER).is_dir() else path / ADAPTER
    refuse_pickle(folder / FILE)
    if not (folder / FILE).exists():
        raise EfftuneError(f"There is no {folder / FILE}; give a folder that a recipe like shira or lift was saved to.")
    if beside := sorted(other.name for other in folder.glob("*.safetensors") if other.name != FILE):
        raise EfftuneError(f"{folder} holds {', '.join(beside)} as well, of which no sum can be made.")
    return folder / FILE


def masked(changes: Changes, keep: float | None = None, drop_largest: float = 0.0) -> Changes:
    """Without the largest changes of the layer, which are taken for outliers, and without the small ones.

    Args:
        keep: the share of the layer's changes that stays, the largest behind those that are dropped; None: all these.
        drop_largest: the share of its largest changes that becomes 0.
    Raises: EfftuneError for shares that are none, or more than there is together.
    Source: Davari and Belilovsky 2023, arXiv:2312.06795 (Model Breadcrumbs).
    """
    check(keep, drop_largest)
    count = len(changes.where)
    dropped = min(round(drop_largest * count), count - 1)  # something stays of each layer
    stays = count - dropped if keep is None else max(1, round(keep * count))
    largest = changes.change.abs().sort(descending=True, stable=True).indices
    return _only(changes, largest[dropped : dropped + stays].sort().values)


def check(keep: float | None = None, drop_largest: float = 0.0, alpha: float = 1.0) -> None:
    """Raises: EfftuneError for settings of `masked` and `ternary` that are none."""
    if not 0 <= drop_largest < 1 or (keep is not None and not 0 < keep <= 1):
        raise EfftuneError(
            f"Shares of changes lie between 0 and 1 and leave some, not keep={keep} and drop_largest={drop_largest}."
        )
    if keep is not None and keep + drop_largest > 1 + 1e-9:
        raise EfftuneError(f"keep={keep} and drop_largest={drop_largest} are more than there is; give less of one.")
    if not 0 < alpha < float("inf"):
        raise EfftuneError(f"The scale of signs is a positive number, not alpha={alpha}.")


def ternary(changes: Changes, alpha: float = 1.0, of: Changes | None = None) -> Changes:
    """sign(δ)·α·σ for each change δ of the layer but those that are 0: one bit each in a file, and one scale.

    Args:
        alpha: α, which the paper picks among 0.5 to 10 by the loss on other data; 1 for large models.
        of: the changes whose standard deviation σ is, uncorrected; None: these.
    Raises: EfftuneError for an α that is not above 0.
    Source: Yadav et al. 2023, arXiv:2311.13171 (ComPEFT), where σ is that of all parameters of an adapter before the
        small ones are dropped.
    """
    check(alpha=alpha)
    scale = alpha * float((changes if of is None else of).change.std(correction=0))
    moved = changes.change.nonzero().flatten()
    changes = _only(changes, moved if len(moved) else slice(1))  # something stays of each layer
    return changes._replace(change=changes.change.sign() * scale)


def _only(changes: Changes, which: Tensor | slice) -> Changes:
    return Changes(changes.layer, changes.where[which], changes.original[which], changes.change[which])
