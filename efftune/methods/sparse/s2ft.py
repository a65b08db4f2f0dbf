"""S²FT: a few heads and channels train, and backward keeps the inputs of these alone."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import nn

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.delta.columns import Columns
from efftune.linear.picks import choose
from efftune.methods._base import TRAINS, Method, Run
from efftune.methods.sparse._scores import SCORERS, Matrix, tiles
from efftune.plan import Layer
from efftune.structure import matches

HEADS = r"o_proj|out_proj|attn\.c_proj|(attention|self)\.output\.dense|self_attention\.dense"  # read what heads give
CHANNELS = r"down_proj|fc2|mlp\.c_proj|layer\.\d+\.output\.dense|dense_4h_to_h|ffn_output|w2"


@dataclass(frozen=True)
class S2ft(Method):
    """Trains a few columns of the weights that read what heads and channels of an MLP give: the rest of a layer's input
    is not kept.

    Of layers that read heads, whole heads train, where `ratio` is at least half a head. Nothing is permuted.

    Args:
        ratio: the share of a weight's columns that train.
        scorer: how they are picked: "random" (the paper's), or those of the largest sums of "magnitude", "small" (the
            smallest) or "low_rank" (of the weight's approximation of rank `rank`).
        head_dim: columns of a head; None: what the model's config says; 1: columns train one by one.
        seed: of the picks.   target_modules: the layers; those that read heads are told by their names.
        modules_to_save: see `lora`.
    Source: Yang et al. 2024, arXiv:2412.06289. The code published with it trains another slice than it updates, and
        keeps all of x.
    """

    ratio: float = 0.03
    scorer: str = "random"
    rank: int = 64
    head_dim: int | None = None
    seed: int = 0
    target_modules: str | tuple[str, ...] = f"{HEADS}|{CHANNELS}"
    modules_to_save: tuple[str, ...] | None = None

    name, phase, learning_rate = "s2ft", TRAINS, 1e-3

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise EfftuneError(f"the share of columns that train lies in (0, 1], not {self.ratio}.")
        if self.scorer not in SCORERS:
            raise EfftuneError(f"scorer is one of {', '.join(SCORERS)}, not {self.scorer!r}.")
        if self.head_dim is not None and self.head_dim < 1:
            raise EfftuneError(f"a head has at least 1 column, not head_dim={self.head_dim}.")

    def plan(self, plan):
        def delta(layer: Layer) -> Columns:
            columns = Columns(self.width(plan.model, layer.name, layer.shape[1])[1])
            return columns if plan.writable(layer) else columns.beside()

        plan.adapt(self, delta, self.target_modules, self.modules_to_save)

    def width(self, model: nn.Module, name: str, k: int) -> tuple[int, int]:
        """Of a layer with k inputs: how many columns are picked together, and how many train."""
        size = (self.head_dim or _head_dim(model)) if matches(name, HEADS) else 1
        if k % size:
            raise EfftuneError(
                f"{name}: its {k} inputs are no whole number of heads of {size}; give head_dim, or head_dim=1 for "
                "columns one by one."
            )
        if (heads := round(self.ratio * k / size)) < 1:
            size, heads = 1, max(1, round(self.ratio * k))
        return size, size * heads

    def install(self, run):
        for name, layer in self.layers(run).items():
            size, count = self.width(run.model, name, layer.in_features)
            matrix = Matrix(layer, self.rank, zlib.crc32(f"{self.seed}:{name}".encode()))
            rows = SCORERS[self.scorer](matrix)
            scores = torch.stack([rows(a, b).sum(0, dtype=torch.float64) for a, b in tiles(matrix.shape)]).sum(0)
            best = scores.view(-1, size).sum(1).sort(descending=True, stable=True).indices[: count // size]
            columns = (best[:, None] * size + torch.arange(size, device=best.device)).flatten()
            choose(layer, columns.sort().values)

    def layers(self, run: Run) -> dict[str, Linear]:
        """Those that this method trains, by name, whose weights have data."""
        named = {
            n: run.model.get_submodule(n) for n, layer in run.plan.layers.items() if layer.by.get("delta") == self.name
        }
        return {n: m for n, m in named.items() if isinstance(m, Linear) and not m.columns.is_meta}


def _head_dim(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    return getattr(config, "head_dim", None) or (width // heads if heads and width else 1)
