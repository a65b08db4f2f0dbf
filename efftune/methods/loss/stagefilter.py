"""StageFilter: no backward, and later no forward, for samples that the model has learnt already."""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.methods._base import CHANGES, Method, Run, State
from efftune.modes import evaluation_mode
from efftune.nn.token_losses import CrossEntropies, CrossEntropy

BUCKETS = 2**14  # that token ids are counted in
MEMORY = 0.99  # of the running mean of the predictor's log loss, a row
EASY, HARD = 0, 1


@dataclass
class Seen(State):
    """What the filter knows of the rows so far."""

    losses: list[float] = field(default_factory=list)  # of the last micro-batches, the mean over their rows
    rows: list[int] = field(default_factory=lambda: [0, 0])  # that were easy, and hard
    tokens: Tensor | None = None  # (2, BUCKETS) float32: in how many easy, and hard, rows a token was
    log_loss: float = math.log(2)  # of the predictor, before it learns from a row
    value: float = 0.0  # the loss function's of a row, the mean over those of a micro-batch that ran last
    is_sum: bool = False  # whether the loss function's value is a sum over rows, and not a mean
    done: list[int] = field(default_factory=lambda: [0, 0, 0])  # rows with forward and backward, forward alone, neither
    _called: bool = False
    _all: bool = False  # whether every row trains, and none is looked at

    def load_state_dict(self, state, device):
        super().load_state_dict(state, torch.device("cpu"))  # where tokens are counted


@dataclass(frozen=True)
class StageFilter(Method):
    """Trains on a stream of samples in three stages, the later ones of which leave out rows that the model has learnt.

    1. The first `window` micro-batches train whole. Their mean loss is the threshold, and stays the mean of the last
       `window` micro-batches as the model learns.
    2. The rows of a micro-batch run forward without a gradient, one by one; only those whose loss is at least the
       threshold train. Meanwhile a naive Bayes classifier learns from the tokens of a row whether it will.
    3. Once the running mean of that classifier's log loss is below `confident` nats (a coin has 0.69), a row that it
       thinks easy with more than even odds does not run at all. From a share `look` of them it goes on to learn.

    A row's loss is the mean cross entropy of its tokens, or what the loss function gives where it calls none. What
    trains is a micro-batch of the hard rows: of a loss that is a sum over tokens (the trainer's) the other rows are
    left out, and one that is a mean is the mean of the hard rows. Either is biased towards what is hard, which is the
    purpose; `efftune verify` shows by how much and lets it pass. The loss that is returned stands for the whole
    micro-batch: where rows were left out, it is made from the losses of those that ran.

    Memory: 128 KiB.
    Cost: in units of a forward 3 for a hard row and 1 more to find it, 1 for an easy one, 0 for one that is predicted
        so. With a share h of hard rows stage 2 costs 1 + 3h of 3: it pays below h = 2/3.
    Raises: EfftuneError for settings out of range, and for a batch that has no token ids (B, T).
    Source: Ouyang, Ansari, Lin, Ji 2022, arXiv:2207.14386 (IJCAI 2023). Settings are not the paper's.
    """

    window: int = 16
    confident: float = 0.5
    look: float = 0.1
    seed: int = 0

    name = "stagefilter"
    place = CHANGES
    State = Seen
    verified = (
        "stagefilter: biased by design, towards the rows that the model has not learnt. Its own row says by how much, "
        "over all batches, once rows are left out, and does not count; the others are of gradients of all rows."
    )

    def __post_init__(self):
        if self.window < 1 or not self.confident >= 0 or not 0 <= self.look <= 1:
            raise EfftuneError(f"{self} needs window >= 1, confident >= 0 nats and look between 0 and 1.")

    def backward(self, micro, inner):
        seen: Seen = micro.run.state(self)
        seen._called = True
        if seen._all:
            return inner(micro)
        rows = features(micro.batch)
        loss = row_loss(micro.loss, micro.model)
        if len(seen.losses) < self.window:
            each = [loss(take(micro.batch, [i])) for i in range(len(rows))]
            seen.losses.append(mean([entropy for entropy, _ in each]))
            seen.value, seen.done[0] = mean([value for _, value in each]), seen.done[0] + len(rows)
            whole = inner(micro)
            if len(rows) > 1:
                seen.is_sum = abs(float(whole) - len(rows) * seen.value) < abs(float(whole) - seen.value)
            return whole
        threshold, draw = mean(seen.losses), random.Random(f"{self.seed}:{sum(seen.done)}")
        looked, values, hard = [], [], []
        for i, tokens in enumerate(rows):
            p = probability(seen, tokens)
            if seen.log_loss < self.confident and p < 0.5 and draw.random() >= self.look:
                seen.done[2] += 1
                continue
            entropy, value = loss(take(micro.batch, [i]))
            is_hard = entropy >= threshold
            learn(seen, tokens, p, is_hard)
            seen.done[0 if is_hard else 1] += 1
            looked.append(entropy)
            values.append(value)
            hard += [i] if is_hard else []
        if looked:
            seen.losses, seen.value = [*seen.losses[1:], mean(looked)], mean(values)
        if len(hard) == len(rows):
            return inner(micro)
        if hard:
            inner(dataclasses.replace(micro, batch=take(micro.batch, hard)))
        whole = seen.value * (len(rows) if seen.is_sum else 1)
        return torch.tensor(whole, device=next(micro.model.parameters()).device)

    def after_step(self, run):
        if run.step == 0 and not run.state(self)._called:
            warnings.warn(
                "stagefilter filters in tuner.backward(batch, loss_fn), which this loop does not call: every sample "
                "trains.",
                stacklevel=2,
            )

    @contextmanager
    def exactly(self, run: Run) -> Iterator[None]:
        seen = run.state(self)
        before, seen._all = seen._all, True
        try:
            yield
        finally:
            seen._all = before

    def selects(self, run):
        return len(run.state(self).losses) >= self.window

    def counts(self, run):
        trained, forward, skipped = run.state(self).done
        return {"rows_trained": trained, "rows_forward_only": forward, "rows_not_run": skipped}

    def report(self, run):
        seen = run.state(self)
        trained, forward, skipped = seen.done
        if not any(seen.done):
            return None
        return (
            f"stagefilter: {trained} rows trained, {forward} forward only, {skipped} not run; the predictor's log loss "
            f"is {seen.log_loss:.2f} nats"
        )


def features(batch: Any) -> list[Tensor]:
    """Returns for each row the buckets of its tokens, each once."""
    ids = batch.get("input_ids") if isinstance(batch, dict) else batch
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise EfftuneError("stagefilter takes token ids (B, T), or batches that are dicts with such `input_ids`.")
    return [(row % BUCKETS).unique() for row in ids.cpu()]


def take(batch: Any, rows: list[int]) -> Any:
    """Takes these rows of a batch, from every tensor that has as many rows as input_ids; samples of packed rows go with
    them."""
    index = torch.tensor(rows)
    if isinstance(batch, Tensor):
        return batch.index_select(0, index.to(batch.device))
    count, spans = len(batch["input_ids"]), batch.get("sample_spans")
    packed = ("sample_ids", "sample_spans") if spans is not None else ()
    taken = {
        name: value.index_select(0, index.to(value.device))
        if isinstance(value, Tensor) and value.ndim and len(value) == count and name not in packed
        else value
        for name, value in batch.items()
    }
    if spans is not None:  # row, first column, columns
        place = {row: new for new, row in enumerate(rows)}
        kept = [i for i, row in enumerate(spans[:, 0].tolist()) if row in place]
        taken["sample_ids"], moved = batch["sample_ids"][kept], spans[kept].clone()
        moved[:, 0] = torch.tensor([place[row] for row in moved[:, 0].tolist()], dtype=moved.dtype)
        taken["sample_spans"] = moved
    return taken


def row_loss(loss_fn: Callable[[nn.Module, Any], Tensor], model: nn.Module) -> Callable[[Any], tuple[float, float]]:
    """batch -> the mean cross entropy of its tokens (the loss where it calls none), and the loss, without a trace."""

    def loss(batch: Any) -> tuple[float, float]:
        total, count = 0.0, 0

        def noted(call: CrossEntropy) -> Tensor:
            nonlocal total, count
            terms = call.terms()
            total, count = total + float(terms.sum()), count + int(call.counts().sum())
            return call.reduced(terms)

        with torch.no_grad(), evaluation_mode(model), CrossEntropies(noted):
            value = loss_fn(model, batch)
        return total / count if count else float(value), float(value)

    return loss


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def probability(seen: Seen, tokens: Tensor) -> float:
    """Returns the probability that a row with these tokens is hard, by naive Bayes over which tokens it has, with one
    added to each count."""
    if seen.tokens is None or not all(seen.rows):
        return 0.5
    easy, hard = (((seen.tokens[c, tokens] + 1) / (seen.rows[c] + 2)).log().sum() for c in (EASY, HARD))
    odds = float(hard - easy) + math.log(seen.rows[HARD] / seen.rows[EASY])
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, odds))))


def learn(seen: Seen, tokens: Tensor, p: float, is_hard: bool) -> None:
    """Notes how well p predicted the row, then counts the row."""
    if seen.tokens is None:
        seen.tokens = torch.zeros(2, BUCKETS)
    seen.tokens[HARD if is_hard else EASY, tokens] += 1
    seen.rows[HARD if is_hard else EASY] += 1
    seen.log_loss = MEMORY * seen.log_loss - (1 - MEMORY) * math.log(p if is_hard else 1 - p)
