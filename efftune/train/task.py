"""What a model is trained on: a loss that is a sum over terms, how many terms a batch has, and what evaluation counts.

Sums, not means: with micro-batches of different numbers of loss tokens the mean of means is not the mean. A step
divides by the number of terms in all of its micro-batches together, so 1 x 4 and 4 x 1 give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from efftune.nn.linear_cross_entropy import lm_head_loss
from efftune.train.data import IGNORED

Batch = dict[str, torch.Tensor]


def count_labels(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())


@dataclass(frozen=True)
class Task:
    loss: Callable[[nn.Module, Any], torch.Tensor]  # scalar: the sum over the terms of a batch
    terms: Callable[[Any], int] = count_labels
    evaluate: Callable[[nn.Module, Any], dict[str, torch.Tensor]] | None = None  # sums by name; None: the loss

    def sums(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return self.evaluate(model, batch) if self.evaluate else {"loss": self.loss(model, batch)}


def _inputs(batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch
    }
    if "position_ids" in inputs:
        # With a cache, which is Hugging Face's default, the restarts of position_ids are not looked at and
        # packed documents would see each other.
        inputs["use_cache"] = False
    return inputs


def _forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**_inputs(batch)).logits


def causal_lm_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of the cross-entropies of all labelled tokens, in float32."""
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()  # (B·T,): what each position predicts
    counted = (targets != IGNORED).nonzero().squeeze(1)
    loss = lm_head_loss(model, _inputs(batch), counted, targets[counted])
    if loss is not None:
        return loss
    logits = _forward(model, batch).flatten(0, 1)  # (B·T, V), a view; [:, :-1] would copy them all
    # selected before the cast: prompts and padding cost no float32 logits
    return F.cross_entropy(logits.index_select(0, counted).float(), targets[counted], reduction="sum")


def classification_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(_forward(model, batch).float(), batch["labels"], reduction="sum")


def classification_sums(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    logits = _forward(model, batch).float()
    loss = F.cross_entropy(logits, batch["labels"], reduction="sum")
    return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["labels"]).sum()}


CAUSAL_LM = Task(causal_lm_loss)
CLASSIFICATION = Task(classification_loss, evaluate=classification_sums)


def autocast(task: Task, device: str) -> Task:
    """The same task under bfloat16 autocast; the losses themselves stay float32."""

    def under(function: Callable) -> Callable:
        def run(model: nn.Module, batch: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return function(model, batch)

        return run

    return Task(under(task.loss), task.terms, under(task.sums))
