"""LT-SFT: the entries that moved most in full training are trained alone, from where they began."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from efftune.errors import EfftuneError
from efftune.methods._base import ESTIMATES
from efftune.methods.sparse._scores import largest
from efftune.methods.sparse._sparse import FILE, Sparse
from efftune.optim.contract import restart


@dataclass(frozen=True)
class Ltsft(Sparse):
    """Trains the entries of each weight that a run of full training moved most, from the weights that it began with.

    Which ones, either `file` says, what an earlier run of `full` wrote, or a first phase: for `after` steps all entries
    train, then those with the largest |δ| are picked, all weights become what they were, and the optimizer begins anew.
    Several results compose (`interop.changes.compose`), where they began with the same weights.

    Args:
        density: the share of a weight's entries that train in the end.
        file: a folder of `Tuner.save` or `efftune train`, or a checkpoint of the model, of a run of `full`.
        after: steps of the first phase, where no file is given.
        target_modules, modules_to_save: see `lora`; what `modules_to_save` names trains through both phases.
    Memory: with `file` no more than `shira`: the run of `full`, which may be elsewhere, is read by rows. The first
        phase takes more than `full` does. In bfloat16 under AdamW, each entry of the weights takes 22 bytes beside the
        weight (index 4, original 2, δ 4, gradient 4, moments 8), where `full` takes 6. What is loaded has none of it.
    Source: Ansell et al. 2022, arXiv:2110.07560.
    """

    density: float = 0.05
    scorer: ClassVar[str] = FILE  # of no first phase
    rank: ClassVar[int] = 1
    seed: ClassVar[int] = 0
    after: int = 200

    name = "ltsft"

    def __post_init__(self):
        self.delta()
        if self.after < 1:
            raise EfftuneError(
                f"all entries train for at least one step before they are picked, not after={self.after}."
            )

    @property
    def picks_again(self):
        return self.file is None

    def why_not(self, others):
        without = [m.name for m in others if m.place == ESTIMATES and m.overrides("optimizer")]
        if self.file is None and without:
            return (
                f"what {without[0]} moves most in a few steps is where random directions point; give ltsft the file "
                "of a run of full"
            )
        return super().why_not(others)

    def install(self, run):
        if self.file is not None:
            super().install(run)

    def before_step(self, run):
        if self.file is None:
            for layer in self.layers(run).values():
                count = layer.out_features * layer.in_features
                if run.step < self.after and len(layer.indices) < count and not layer.values.any():
                    # Here and not before: what is loaded has no first phase, and goes on from what it has learnt.
                    self.take(run, layer, torch.arange(count))
                elif run.step == self.after and len(layer.indices) == count:
                    self.rewind(run, layer)

    def report(self, run):
        if self.file is None and run.step <= self.after:
            return (
                f"ltsft picks entries after {self.after} steps, and there were {run.step}: what trained so far is of "
                "the first phase, which is rewound; train longer, or give after=."
            )
        return None

    def rewind(self, run, layer):
        shape = layer.out_features, layer.in_features
        moved = layer.values.detach().view(shape)
        picks = largest(lambda a, b: moved[a:b].float().abs_(), shape, self.delta().count(shape))
        self.take(run, layer, picks, forget=True)
        with torch.no_grad():
            layer.values.zero_()
        if run.optimizer is not None:
            restart(run.optimizer, layer.values)
