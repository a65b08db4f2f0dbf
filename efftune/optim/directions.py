"""Random directions over named weights that are never stored: z(seed), drawn again wherever it is needed."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from efftune.ops.perturb import perturb, perturb_many

Named = Iterable[tuple[str, nn.Parameter]]


def stream_of(name: str) -> int:
    """Returns the random stream of a parameter, which follows from its name, never from its position in a list."""
    return zlib.crc32(name.encode())


class Directions:
    """z over the parameters that `named_parameters` gives: with entries of distribution `dist`, scaled for each tensor
    by s, and 0 at the entries that rest.

    Args:
        named_parameters: called for (name, parameter) pairs; the name picks the random stream.
        dist, per_layer, sparsity: as `ZerothOrderSGD` has them.
    """

    def __init__(self, named_parameters: Callable[[], Named], dist: str, per_layer: str, sparsity: float):
        self.named_parameters = named_parameters
        self.dist, self.per_layer, self.sparsity = dist, per_layer, sparsity
        self.scales: dict[str, float] = {}  # s, for per_layer
        self.thresholds: dict[str, float | None] = {}
        self.amounts: dict[tuple, Tensor] = {}  # of this step, what every layer's z is multiplied by

    def threshold(self, name: str, w: Tensor) -> float | None:
        """Returns the largest |w_i| that trains, of the tensor as it was when first asked for; of its entries that are
        not zero where it would be 0 otherwise. None means all entries, as in a tensor of zeros (LoRA's B, biases),
        whose sizes say nothing yet."""
        if not self.sparsity:
            return None
        if name not in self.thresholds:
            sizes = w.detach().abs().flatten().float()
            share = 1 - self.sparsity
            self.thresholds[name] = smallest(sizes, share) or smallest(sizes[sizes > 0], share)
        return self.thresholds[name]

    def scale(self, name: str) -> float:
        """Returns s of the parameter `name`, from all parameters as they are when a scale is first asked for."""
        if self.per_layer == "none":
            return 1.0
        if not self.scales:
            squares = {n: float(p.detach().double().square().sum()) for n, p in self.named_parameters()}
            counted = [p.numel() for n, p in self.named_parameters() if squares[n]]
            mean = sum(squares.values()) / max(1, sum(counted))
            for n, p in self.named_parameters():
                self.scales[n] = 2.0 ** round(math.log2(squares[n] / p.numel() / mean) / 2) if squares[n] else 1.0
        return self.scales[name]

    def perturbed(self, names: Sequence[str], w: Sequence[Tensor], eps: float, seed: int) -> list[Tensor]:
        """Returns w + eps·s·z(seed) in new tensors. Tensors of one scale, dtype and device are written by one call."""
        together: dict[tuple, list[int]] = defaultdict(list)
        for i, (name, t) in enumerate(zip(names, w, strict=True)):
            together[self.scale(name), t.dtype, t.device].append(i)
        made: list[Tensor] = list(w)
        for (scale, dtype, device), at in together.items():
            key = eps * scale, (wide := torch.promote_types(dtype, torch.float32)), device
            if key not in self.amounts:
                self.amounts[key] = torch.full((), eps * scale, dtype=wide, device=device)
            new = perturb_many(
                [w[i] for i in at], self.amounts[key], seed=seed, streams=[stream_of(names[i]) for i in at],
                dist=self.dist, thresholds=[self.threshold(names[i], w[i]) for i in at],
            )  # fmt: skip
            if len(at) == len(w):
                return new
            for i, t in zip(at, new, strict=True):
                made[i] = t
        return made

    def add(self, name: str, w: Tensor, a: Tensor, seeds: Sequence[int], rounding: str, out: Tensor | None = None):
        """Writes w + u · Σ a·z(seed) of the parameter `name`, rounded once, into `out`, with the arguments of
        `perturb`."""
        a = a.to(w.device, torch.promote_types(w.dtype, torch.float32)) * self.inverse_scale(name)
        return perturb(w, a, seed=seeds, stream=stream_of(name), dist=self.dist, rounding=rounding, out=out)

    def estimate(self, name: str, w: Tensor, scalars: Mapping[int, float]) -> Tensor:
        """Returns u · Σ a·z over `scalars` (a by seed), in float32 or wider, and 0 at the entries that rest."""
        zero = torch.zeros(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
        made = self.add(name, zero, torch.tensor(list(scalars.values()), dtype=torch.float64), list(scalars), "nearest")
        threshold = self.threshold(name, w)
        return made if threshold is None else torch.where(w.abs() <= threshold, made, 0.0)

    def inverse_scale(self, name: str) -> float:
        """Returns u of the parameter `name`: 1/s where per_layer is "variance", else 1."""
        return 1 / self.scale(name) if self.per_layer == "variance" else 1.0


def smallest(sizes: Tensor, share: float) -> float | None:
    """Returns the largest of the `share` smallest of sizes (n,), or None where there are none."""
    return float(sizes.kthvalue(max(1, round(share * len(sizes)))).values) if len(sizes) else None
