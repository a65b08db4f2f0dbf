"""S²FT: a few heads and channels train, and backward keeps the inputs of these alone."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.delta.columns import Columns, above
from efftune.linear.picks import choose
from efftune.methods._base import Run
from efftune.methods.sparse._batch import ACTIVATION, GRADIENT, Picks
from efftune.methods.sparse._scores import SCORERS, Matrix, Rows, tiles
from efftune.methods.sparse._watch import NotFinite, gradient, gradients, inputs
from efftune.structure import matches

HEADS = r"o_proj|out_proj|attn\.c_proj|(attention|self)\.output\.dense|self_attention\.dense"  # read what heads give
CHANNELS = r"down_proj|fc2|mlp\.c_proj|layer\.\d+\.output\.dense|dense_4h_to_h|ffn_output|w2"


@dataclass(frozen=True)
class S2ft(Picks):
    """Trains a few columns of the weights that read what heads and channels of an MLP give: the rest of a layer's input
    is not kept.

    Of layers that read heads, whole heads train, where `ratio` is at least half a head. Nothing is permuted.

    Args:
        ratio: the share of a weight's columns that train.
        scorer: how they are picked: "random" (the paper's), or those of the largest sums of "magnitude", "small" (the
            smallest) or "low_rank" (of the weight's approximation of rank `rank`); of the largest "activation" (sum of
            x² over all tokens of the first micro-batch) or "gradient" (norm of the column of dW of the first
            micro-batch, which runs once more for it).
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

    name, learning_rate = "s2ft", 1e-3
    of_batch = ACTIVATION, GRADIENT
    what = "columns"
    instead = "s2ft with a scorer of the weight", "s2ft with a scorer of the weight"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise EfftuneError(f"the share of columns that train lies in (0, 1], not {self.ratio}.")
        if self.head_dim is not None and self.head_dim < 1:
            raise EfftuneError(f"a head has at least 1 column, not head_dim={self.head_dim}.")

    def plan(self, plan):
        self.adapt(plan, lambda layer: Columns(self.width(plan.model, layer.name, layer.shape[1])[1]))

    def width(self, model: nn.Module, name: str, k: int) -> tuple[int, int]:
        """Of a layer with k inputs: how many columns are picked together, and how many train."""
        size = (self.head_dim or _head_dim(model)) if matches(name, HEADS) else 1
        if k % size:
            raise EfftuneError(
                f"{name}: its {k} inputs are no whole number of heads of {size}; give head_dim, or head_dim=1 for "
                "columns one by one."
            )
        if (heads := round(self.ratio * k / size)) < 1:
            size, heads = 1, round(self.ratio * k)
        if heads < 1:
            raise EfftuneError(
                f"{name}: ratio={self.ratio} is less than one of its {k} columns; use a larger ratio or other layers."
            )
        return size, size * heads

    def install(self, run):
        if not self.by_batch:
            layers, scores = self.layers(run), dict[str, Tensor]()
            for name, layer in layers.items():
                matrix = Matrix(layer, self.rank, zlib.crc32(f"{self.seed}:{name}".encode()))
                scores[name] = _sums(SCORERS[self.scorer](matrix), matrix.shape)
            self.pick(run, layers, scores)

    def look(self, micro):
        # An adapter that was loaded goes on with its columns: others would begin with W as it was stored.
        layers = {name: layer for name, layer in self.layers(micro.run).items() if not layer.values.any()}
        scores = dict[str, Tensor]()

        def add(name: str, x: Tensor) -> None:
            squares = torch.linalg.vector_norm(x, dim=0, dtype=above(x.dtype)).double().square()
            scores[name] = scores[name] + squares if name in scores else squares

        def see(name: str, g: Tensor, z: Tensor) -> None:
            rows = gradient(g, z)
            scores[name] = _sums(lambda a, b: rows(a, b).square_(), (g.shape[1], z.shape[1]))

        if self.scorer == ACTIVATION:
            inputs(micro, layers, add)
        else:
            gradients(micro, layers, see)
        self.pick(micro.run, layers, scores)

    def pick(self, run: Run, layers: dict[str, Linear], scores: dict[str, Tensor]) -> None:
        """Lets the columns, or whole heads, of the largest sums of scores (K,) train. Raises: EfftuneError, before the
        first is picked, for scores that are no numbers."""
        wrong = [name for name, found in scores.items() if not bool(found.isfinite().all())]
        if wrong:
            raise NotFinite(
                f"{wrong[0]}: a column's score by {self.scorer!r} is NaN or Inf; look for it in the weights and the "
                "batch."
            )
        for name, found in scores.items():
            size, count = self.width(run.model, name, len(found))
            best = found.view(-1, size).sum(1).sort(descending=True, stable=True).indices[: count // size]
            columns = best[:, None] * size + torch.arange(size, device=best.device)
            choose(layers[name], columns.flatten().sort().values)


def _sums(rows: Rows, shape: tuple[int, int]) -> Tensor:
    """Of each column, (K,) float64."""
    return torch.stack([rows(a, b).sum(0, dtype=torch.float64) for a, b in tiles(shape)]).sum(0)


def _head_dim(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    return getattr(config, "head_dim", None) or (width // heads if heads and width else 1)
