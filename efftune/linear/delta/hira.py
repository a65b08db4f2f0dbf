"""HiRA: W times a low-rank matrix, entry by entry, is added to W."""

from __future__ import annotations

from dataclasses import dataclass, replace

from efftune.errors import EfftuneError
from efftune.linear.delta.lora import LoRA
from efftune.linear.delta.tiled import Tiled


@dataclass(frozen=True)
class HiRA(Tiled):
    """y = x·Wᵀ + drop(x)·(W ∘ B·A)ᵀ + bias: ΔW has the free numbers of a LoRA of rank r, and a rank up to r times W's.

    Args (as in PEFT):
        r: rank of B·A, 1 ≤ r ≤ min(N, K).   hira_dropout: probability in [0, 1) on what ΔW is multiplied by.
        dtype: of A and B, as in `LoRA`.
    Shapes: A `hira_a` (r, K), B `hira_b` (N, r). A starts uniform in ±1/√K (Kaiming, a = √5), B at zero.
    Gradients: x, A, B (and the bias, if it trains); never W.
    Numerics, saved for backward, time: see `Tiled`. N·K numbers never exist at once, of ΔW or of its gradient.
    Raises: EfftuneError (a ValueError) on a rank, dropout or dtype out of range.
    Source: Huang et al. 2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, ICLR.
    """

    r: int = 32
    hira_dropout: float = 0.0
    dtype: str | None = "float32"

    names = ("hira_a", "hira_b")
    of_weight = True

    def __post_init__(self):
        try:
            self._factors()
        except EfftuneError as error:
            raise EfftuneError(str(error).replace("lora", "hira")) from None

    def _factors(self) -> LoRA:
        """A LoRA with factors of the same shapes, which begin the same way."""
        return LoRA(self.r, lora_dropout=self.hira_dropout, dtype=self.dtype)

    @property
    def drop(self):
        return self.hira_dropout

    def init(self, shape, dtype, device):
        return self._factors().init(shape, dtype, device)

    def eval(self):
        return replace(self, hira_dropout=0.0)

    def why_not(self, base, keep, shape):
        return self._factors().why_not(base, keep, shape)

    def tile(self, p, a, b, w):
        return (p[1][a:b] @ p[0]).mul_(w)
