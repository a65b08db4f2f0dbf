"""What sparse deltas changed, as LoRA adapters of PEFT's: the nearest matrices of a low rank, and how near they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.interop.peft import LORA, PREFIX, Layout, in_several_places
from efftune.interop.sparse import Changes, flat, parts_of, trained
from efftune.linear import LoRA
from efftune.methods.sparse._scores import Matrix, tiles, truncated


@torch.no_grad()
def save_lora(tuned, path: str | Path, r: int = 16, seed: int = 0) -> dict[str, float]:
    """Writes what the entries or columns of each layer changed to the folder `path` as a LoRA adapter of PEFT's:
    ΔW ≈ B·A, of rank r at most. `efftune.load` reads it, too.

    Args:
        tuned: an `efftune.Tuner` with a recipe like shira, lift or s2ft.   r: the rank.   seed: of the approximation.
    Returns: ‖ΔW - B·A‖ / ‖ΔW‖ in the Frobenius norm, by the names of the layers, and under "" that of all layers
        together; 0 where nothing has changed. Entries that lie scattered have no low rank: their errors are large.
    Numerics: float32, by a block Krylov iteration over products with ΔW, of which no more is held than its entries and
        a tile of rows. Exact, with B the columns themselves, where at most r columns (or rows) of a layer have changed.
    Raises: EfftuneError, before anything is written, for a rank below 1, without such a layer, and where something
        trains that PEFT's LoRA has no place for.
    """
    if r < 1:
        raise EfftuneError(f"A LoRA adapter has a rank of at least 1, not {r}.")
    shared = in_several_places(tuned.model)
    layers = {name: layer for name, layer in trained(tuned).items() if name not in shared}
    if not layers:
        raise EfftuneError("No entries and no columns train in this model, of which an adapter could be made.")
    layout = Layout.around(tuned, LORA, dict.fromkeys(layers))
    saved = {f"{name}.{part}" for name, layer in layers.items() for part in layer.delta.names} | {*layout.keys.values()}
    if left := sorted(tuned.named_trained().keys() - saved):
        raise EfftuneError(
            f"A LoRA adapter would lose {', '.join(left[:5])}; merge the model, or save it by tuner.save."
        )
    tensors, errors, lost, whole = dict[str, Tensor](), dict[str, float](), 0.0, 0.0
    for name, layer in layers.items():
        changes = flat(layer, parts_of(layer))
        b, a = _low_rank(changes, min(r, *changes.shape), seed)
        layout.deltas[name] = LoRA(r=len(a), lora_alpha=len(a))
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a.contiguous(), f"{PREFIX}{name}.lora_B.weight": b.contiguous()}
        size, rest = float(changes.change.square().sum()), _rest(changes, b, a)
        errors[name] = (rest / size) ** 0.5 if size else 0.0
        lost, whole = lost + rest, whole + size
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    layout.write(tuned, set(layout.keys.values()), path, tensors)
    return {**errors, "": (lost / whole) ** 0.5 if whole else 0.0}


def _low_rank(of: Changes, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """B (N, r) and A (r, K), float32, for r or fewer."""
    change, places = of.change.float(), (of.where // of.shape[1], of.where % of.shape[1])
    for i in (1, 0):
        which, place = places[i].unique(return_inverse=True)
        if len(which) <= r:  # columns, or rows, as they are, and which ones
            values, few = torch.zeros(len(which), of.shape[1 - i]), torch.zeros(len(which), of.shape[i])
            values[place, places[1 - i]] = change
            few[torch.arange(len(which)), which] = 1
            return (values.t(), few) if i else (few.t(), values)
    matrix = torch.sparse_coo_tensor(torch.stack(places), change, of.shape, check_invariants=False).coalesce()
    u, v = truncated(_Change(of.layer, r, seed, matrix))
    size = u.norm(dim=0).sqrt()  # u has the singular values: half of each goes to v
    size = torch.where(size > 0, size, 1)
    return u / size, v * size[:, None]


@dataclass(frozen=True)
class _Change(Matrix):
    """ΔW in place of W."""

    change: Tensor  # (N, K), sparse, on the CPU

    @property
    def device(self):
        return torch.device("cpu")

    def times(self, right):
        return torch.sparse.mm(self.change, right)

    def t_times(self, left):
        return torch.sparse.mm(self.change.t(), left)


def _rest(of: Changes, b: Tensor, a: Tensor) -> float:
    """‖ΔW - B·A‖², by tiles of rows, in float64."""
    k, total, a = of.shape[1], 0.0, a.double()
    for first, last in tiles(of.shape):
        i, j = torch.searchsorted(of.where, torch.tensor([first * k, last * k])).tolist()
        tile = b[first:last].double() @ a
        tile.view(-1)[of.where[i:j] - first * k] -= of.change[i:j]
        total += float(tile.square().sum())
    return total
