"""What another run changed, as the scores of entries: |θ₁ - θ₀|, read from its files by tiles of rows."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.files import ADAPTER, refuse_pickle
from efftune.linear.module import is_conv1d
from efftune.methods.sparse._scores import Matrix, Rows, tiles

TRAINED = "trained.safetensors"  # what `Tuner.save` and the checkpoints of a run have


class Weights:
    """θ₁ of a run of `full`, by the names of the model's weights; rows of a weight are read when they are asked for.

    Args:
        path: a folder that `Tuner.save` or `efftune train` has written, a checkpoint of the model, or a file of either.
    Raises: EfftuneError where there are no safetensors, or damaged ones.
    """

    def __init__(self, path: str):
        from safetensors import SafetensorError, safe_open

        self.path, folder = path, Path(path)
        if (folder / ADAPTER).is_dir():
            folder = folder / ADAPTER
        files = [folder] if folder.is_file() else [folder / TRAINED] if (folder / TRAINED).exists() else []
        files = files or sorted(folder.glob("*.safetensors"))
        if not files or not path:  # "" is no folder, where pathlib takes it for this one
            refuse_pickle(folder / TRAINED)
            raise EfftuneError(
                f"There is no safetensors file in {path}; give the folder that a run of full was saved to."
            )
        self.file: dict[str, Path] = {}  # name -> where it is
        for file in files:
            refuse_pickle(file)
            try:
                with safe_open(file, "pt") as opened:
                    self.file.update(dict.fromkeys(opened.keys(), file))
            except SafetensorError as error:
                raise EfftuneError(f"{file} is damaged ({error}); save or fetch it again.") from None

    def rows(self, layer: str, a: int, b: int, transposed: bool) -> Tensor:
        """θ₁[a:b] of a layer (b - a, K), in the file's dtype. `transposed`: of one that stores (K, N)."""
        from safetensors import safe_open

        with safe_open(self.file[f"{layer}.weight"], "pt") as opened:
            part = opened.get_slice(f"{layer}.weight")
            return part[:, a:b].t() if transposed else part[a:b]

    def check(self, layer: str, module: nn.Module, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Raises EfftuneError, naming the layer, where it has no such weight, or one that is not finite."""
        transposed, why = stores_transposed(module), None
        if f"{layer}.weight" not in self.file:
            why = "has no weight of it; give a run of full, or the merged checkpoint that efftune merge writes"
        else:
            first = self.rows(layer, 0, 1, transposed)
            found = self._shape(layer, transposed)
            if found != shape:
                why = f"has a weight of {found}, and this one is {shape}; give a run of the same model"
            elif not first.is_floating_point() or first.dtype.itemsize < dtype.itemsize:
                why = (
                    f"has {first.dtype} for a weight in {dtype}, and what that rounds away would pass for a change; "
                    "load the model in the dtype of the run"
                ).replace("torch.", "")
            elif not all(self.rows(layer, a, b, transposed).isfinite().all() for a, b in tiles(shape)):
                why = "has NaN or Inf in its weight; give a run that did not diverge"
        if why is not None:
            raise EfftuneError(f"{layer}: {self.path} {why}.")

    def _shape(self, layer: str, transposed: bool) -> tuple[int, ...]:
        from safetensors import safe_open

        with safe_open(self.file[f"{layer}.weight"], "pt") as opened:
            shape = tuple(opened.get_slice(f"{layer}.weight").get_shape())
        return shape[::-1] if transposed else shape

    def differs(self, layer: str, module: nn.Module, shape: tuple[int, int]) -> bool:
        """Whether it has another weight of a layer that passed `check`."""
        weight, transposed = cast(Tensor, module.weight), stores_transposed(module)
        weight = weight.t() if transposed else weight
        parts = ((self.rows(layer, a, b, transposed), weight[a:b]) for a, b in tiles(shape))
        return weight.is_meta or any(not torch.equal(there, own.to("cpu", there.dtype)) for there, own in parts)

    def changed(self, matrix: Matrix, name: str) -> Rows:
        """|θ₁ - θ₀| of the layer `name`, where θ₀ is W as it was stored."""
        layer, transposed = matrix.layer, stores_transposed(matrix.layer)
        w = layer.take_back()

        def rows(a: int, b: int) -> Tensor:
            there = self.rows(name, a, b, transposed).to(matrix.device)
            dtype = torch.promote_types(torch.promote_types(there.dtype, w.dtype), torch.float32)
            return (there.to(dtype) - layer.base.rows(w, a, b, dtype)).abs_().float()

        return rows


def stores_transposed(module: nn.Module) -> bool:
    """Whether it is, or was, a Conv1D."""
    return is_conv1d(module) or getattr(module, "conv1d", None) is not None
