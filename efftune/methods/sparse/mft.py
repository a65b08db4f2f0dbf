"""MFT: a trained model gets better where some of its weights are switched off."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.methods.sparse._masks import Masks


@dataclass(frozen=True)
class Mft(Masks):
    """Switches single entries of trained weights off, by scores that train; no weight changes otherwise.

    `efftune.linear.delta.masked.Masked` says how masks are computed, and how scores get a gradient. All entries are on
    at first. Meant for a model that was fine-tuned already.

    Args:
        density: the share of a weight's entries that have a score, which is the most that can be off.
        threshold: entries with a score above it are on.   init: the first score; learning rates are to be seen beside
            init - threshold, the way that a score has to go until its entry is off.
        scorer, rank, seed, file: which entries, but for "gradient": see `shira`.
        target_modules, modules_to_save: see `lora`.
    Source: Zhang et al. 2025, arXiv:2503.22764. The scores' threshold and beginning are those of Mallya et al. 2018,
        arXiv:1801.06519.
    """

    name, learning_rate = "mft", 1e-3
