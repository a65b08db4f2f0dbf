"""What a model is trained on: a loss that is a sum over terms, how many terms a batch has, and what evaluation counts.

Sums, not means: with micro-batches of different numbers of loss tokens the mean of means is not the mean. A step
divides by the number of terms in all of its micro-batches together, so 1 x 4 and 4 x 1 give the same gradient.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from efftune.errors import EfftuneError
from efftune.interop.transformers.lm_head import lm_head_loss
from efftune.recipe import nearest
from efftune.train.data import IGNORED

Batch = dict[str, torch.Tensor]
Metric = Callable[[torch.Tensor, torch.Tensor], Any]  # logits (n, classes), labels (n,) -> number, higher is better


def count_labels(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())


@dataclass(frozen=True)
class Task:
    loss: Callable[[nn.Module, Any], torch.Tensor]  # scalar: the sum over the terms of a batch
    terms: Callable[[Any], int] = count_labels
    evaluate: Callable[[nn.Module, Any], dict[str, torch.Tensor]] | None = None  # sums by name; None: the loss
    # name and function of what is no sum: it is given the "logits" and "labels" of `evaluate`, of all batches together
    whole: tuple[str, Metric] | None = None

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


def _targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions (of B·T) that predict a labelled token, and these tokens."""
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()  # (B·T,): what each position predicts
    counted = (targets != IGNORED).nonzero().squeeze(1)
    return counted, targets[counted]


def causal_lm_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of the cross-entropies of all labelled tokens, in float32."""
    loss = lm_head_loss(model, _inputs(batch), *_targets(batch))
    return loss if loss is not None else F.cross_entropy(*causal_lm_scores(model, batch), reduction="sum")


def causal_lm_scores(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits (n, V) in float32, labels (n,)) of the n positions that predict a labelled token."""
    counted, targets = _targets(batch)
    logits = _forward(model, batch).flatten(0, 1)  # (B·T, V), a view; [:, :-1] would copy them all
    # selected before the cast: prompts and padding cost no float32 logits
    return logits.index_select(0, counted).float(), targets


def classification_scores(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits (B, classes) in float32, labels (B,))."""
    return _forward(model, batch).float(), batch["labels"]


def classification_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(*classification_scores(model, batch), reduction="sum")


def classification_sums(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    logits, labels = classification_scores(model, batch)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).sum()}


CAUSAL_LM = Task(causal_lm_loss)
CLASSIFICATION = Task(classification_loss, evaluate=classification_sums)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of rows whose largest logit is that of the label; float64."""
    return (logits.argmax(-1) == labels).double().mean()


def f1(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """2·TP / (2·TP + FP + FN) of each class, averaged over the classes that labels or predictions have (macro: which
    class is called the positive one does not matter); float64."""
    predicted, classes = logits.argmax(-1), logits.shape[-1]
    hits = torch.bincount(labels[predicted == labels], minlength=classes)
    each = torch.bincount(labels, minlength=classes) + torch.bincount(predicted, minlength=classes)
    return (2 * hits[each > 0] / each[each > 0].double()).mean()


METRICS: dict[str, Metric] = {"accuracy": accuracy, "f1": f1}


def make_task(kind: Literal["causal-lm", "classification"], objective: str | Metric = "loss") -> Task:
    """What `efftune train --task kind --objective objective` trains: the loss, or the negative of a metric.

        loss(model, batch) = −metric(logits, labels) · terms(batch)

    so that the mean loss of a step is the negative mean of its micro-batches' metrics, weighted by their terms. For
    accuracy, a sum over terms, that is the accuracy of the step, however its rows are cut into micro-batches. F1 is no
    sum over rows: that of two micro-batches of 8 is the mean of two F1, not the F1 of 16 rows.

    Args:
        kind: "causal-lm" or "classification".
        objective: "loss", the cross-entropy; "accuracy", for causal-lm the share of labelled tokens that are predicted
            right; "f1", macro F1 of the classes; "package.module:function" or "path/to/file.py:function"; or the
            function itself, metric(logits, labels) -> a number, higher is better. logits (n, classes) in float32 and
            labels (n,) are on the model's device; for causal-lm n is the number of labelled tokens, and the logits are
            those that predict them.
    A metric has no gradient: only zeroth-order recipes train it. It is constant but where a prediction changes, so that
    the two sides of a direction are often equal: a is 0, and the step changes nothing. eps has to be so large that most
    steps see a prediction change, and so small that the model still works: the mean of the two sides, which a step
    reports as its loss, stays near the metric of the model itself. Begin at 1e-2 where all weights train and at 5e-2
    for LoRA, with as many rows as fit.
    Memory: the logits of a causal-lm batch, which the loss does not need.
    Evaluation gives the cross-entropy as eval_loss and the metric as eval_accuracy, eval_f1 or eval_<name of the
    function>: for classification of all held-out rows together, for causal-lm (whose logits would fill the memory) the
    mean over batches, weighted by terms.
    Raises: EfftuneError for an unknown name, a module that cannot be imported, f1 of a causal-lm; from the loss, where
    a gradient is asked for or the function's result is no number.
    """
    if kind not in ("causal-lm", "classification"):
        raise EfftuneError(f"There is no kind {kind!r}; it is 'causal-lm' or 'classification'.")
    classify = kind == "classification"
    if objective == "loss":
        return CLASSIFICATION if classify else CAUSAL_LM
    if objective == "f1" and not classify:
        raise EfftuneError("f1 is a metric of classes; for causal-lm use accuracy, or a function of your own.")
    if isinstance(objective, str):
        name, metric = _find(objective)
    else:
        name, metric = getattr(objective, "__name__", "metric"), objective
    if name == "loss":
        raise EfftuneError("A metric called loss would hide the cross-entropy, and is maximised; give it another name.")
    scores = classification_scores if classify else causal_lm_scores

    def number(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = metric(logits, labels)
        if isinstance(value, Real) or (isinstance(value, torch.Tensor) and value.numel() == 1):
            return torch.as_tensor(value, dtype=torch.float64, device=logits.device).reshape(())
        raise EfftuneError(f"The metric {name} returned a {type(value).__name__} and no number; let it return a float.")

    def total(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The metric times terms; 0 for a batch without labels, of which it has nothing to say."""
        return len(labels) * number(logits, labels) if len(labels) else logits.new_zeros((), dtype=torch.float64)

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise EfftuneError(
                f"{name} has no gradient, and this recipe takes one; train with a zeroth-order recipe such as mezo."
            )
        logits, labels = scores(model, batch)
        return -total(logits, labels)

    def evaluate(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits, labels = scores(model, batch)
        sums = {"loss": F.cross_entropy(logits, labels, reduction="sum")}
        if classify:
            return sums | {"accuracy": (logits.argmax(-1) == labels).sum(), "logits": logits, "labels": labels}
        return sums | {name: total(logits, labels)}

    return Task(loss, evaluate=evaluate, whole=(name, number) if classify else None)


def _find(objective: str) -> tuple[str, Metric]:
    """Name and function of an objective that is written down."""
    where, _, name = objective.rpartition(":")
    if not where:
        if objective in METRICS:
            return objective, METRICS[objective]
        raise EfftuneError(
            f"There is no objective {objective!r}{nearest(objective, ['loss', *METRICS])}; it can be loss, "
            f"{', '.join(METRICS)}, package.module:function or file.py:function."
        )
    try:
        if where.endswith(".py"):
            spec: Any = importlib.util.spec_from_file_location("efftune_objective", where)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise EfftuneError(
            f"--objective {objective}: {where} cannot be imported ({type(error).__name__}: {reason}); correct it, or "
            "give a file, path/to/file.py:function."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if callable(value)]
        raise EfftuneError(f"--objective {objective}: no function {name!r}{nearest(name, known)} is there; define it.")
    return name, function


def autocast(task: Task, device: str) -> Task:
    """The same task under bfloat16 autocast; the losses themselves stay float32."""

    def under(function: Callable) -> Callable:
        def run(model: nn.Module, batch: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return function(model, batch)

        return run

    return replace(task, loss=under(task.loss), evaluate=under(task.sums))
