"""From encoded examples to batches, deterministically: the data position is (epoch, row) and nothing else.

A batch is a dict of tensors with `input_ids`, `labels`, `sample_ids` (n,), the examples in it, `sample_spans` (n, 3),
the row, first column and length of each, and
- packed: `position_ids`, which start again at 0 with each example, and no attention mask. Transformers models derive
  the block-diagonal mask from the restarts (`separates_documents` checks that a given model does);
- padded: `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from efftune.errors import EfftuneError
from efftune.modes import evaluation_mode
from efftune.train.data import IGNORED, Example

Batch = dict[str, torch.Tensor]
OPEN_ROWS = 64  # rows that packing keeps open; more fill better and cost time


@dataclass
class Data:
    """Examples, how they share rows, and how rows become a batch. Any sequence will do with a collate of its own."""

    examples: list[Any]
    collate: Callable[[list[Any]], Batch]  # rows, each a list of examples, or of one
    seed: int = 0
    row_tokens: int = 0  # above 0: pack examples into rows of at most that many tokens
    shuffle: bool = True
    source: str = ""  # digest of what the examples are from; a run resumes with the same only

    def rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, as indices of examples: a function of (seed, epoch) alone."""
        count = len(self.examples)
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(count) if self.shuffle else np.arange(count)
        if not self.row_tokens:
            return [[int(i)] for i in order]
        return pack([int(i) for i in order], [len(example.input_ids) for example in self.examples], self.row_tokens)

    def batches(self, rows: list[list[int]], batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(rows), batch_size):
            yield self.collate([[self.examples[i] for i in row] for row in rows[start : start + batch_size]])

    def steps(self, rows_per_step: int, epochs: float) -> int:
        """Optimizer steps in so many epochs; the last step of an epoch may have fewer rows."""
        whole = int(epochs)
        counts = [-(-len(self.rows(epoch)) // rows_per_step) for epoch in range(whole)]
        if epochs > whole:
            counts.append(-(-int(len(self.rows(whole)) * (epochs - whole)) // rows_per_step))
        return max(1, sum(counts))

    def from_position(self, epoch: int, row: int, rows_per_step: int) -> Iterator[tuple[int, int, list[list[int]]]]:
        """Endless (epoch, next row, rows of one step), starting at a position."""
        while True:
            rows = self.rows(epoch)
            while row < len(rows):
                taken, row = rows[row : row + rows_per_step], row + rows_per_step
                yield epoch, row, taken
            epoch, row = epoch + 1, 0


def pack(order: list[int], lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Puts each example into the fullest of the open rows that still has room for it, else opens a new row."""
    rows: list[list[int]] = []
    open_rows: list[list[int]] = []  # [free tokens, number of the row]
    for i in order:
        fitting = [entry for entry in open_rows if entry[0] >= lengths[i]]
        if fitting:
            entry = min(fitting)
        else:
            rows.append([])
            entry = [row_tokens, len(rows) - 1]
            open_rows.append(entry)
        entry[0] -= lengths[i]
        rows[entry[1]].append(i)
        if entry[0] == 0:
            open_rows.remove(entry)
        elif len(open_rows) > OPEN_ROWS:
            open_rows.remove(min(open_rows))
    return rows


def collate_packed(pad_id: int) -> Callable[[list[list[Example]]], Batch]:
    def collate(rows: list[list[Example]]) -> Batch:
        width = max(sum(len(example.input_ids) for example in row) for row in rows)
        input_ids = torch.full((len(rows), width), pad_id)
        labels = torch.full((len(rows), width), IGNORED)
        position_ids = torch.zeros((len(rows), width), dtype=torch.long)
        for r, row in enumerate(rows):
            at = 0
            for example in row:
                end = at + len(example.input_ids)
                input_ids[r, at:end] = torch.tensor(example.input_ids)
                labels[r, at:end] = torch.tensor(example.labels)
                position_ids[r, at:end] = torch.arange(end - at)
                at = end
            # The padding is the tail of the last example: nothing before it sees it, so no example is added.
            position_ids[r, at:] = torch.arange(len(row[-1].input_ids), len(row[-1].input_ids) + width - at)
        return _with_ids(rows, input_ids=input_ids, labels=labels, position_ids=position_ids)

    return collate


def collate_padded(pad_id: int, classes: bool = False) -> Callable[[list[list[Example]]], Batch]:
    def collate(rows: list[list[Example]]) -> Batch:
        examples = [row[0] for row in rows]
        width = max(len(example.input_ids) for example in examples)
        input_ids = torch.full((len(rows), width), pad_id)
        labels = torch.full((len(rows), width), IGNORED)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for r, example in enumerate(examples):
            n = len(example.input_ids)
            input_ids[r, :n] = torch.tensor(example.input_ids)
            attention_mask[r, :n] = 1
            if not classes:
                labels[r, :n] = torch.tensor(example.labels)
        if classes:
            labels = torch.tensor([example.labels[0] for example in examples])
        return _with_ids(rows, input_ids=input_ids, labels=labels, attention_mask=attention_mask)

    return collate


def _with_ids(rows: list[list[Example]], **tensors: torch.Tensor) -> Batch:
    ids, spans = [], []
    for r, row in enumerate(rows):
        at = 0
        for example in row:
            ids.append(example.sample_id)
            spans.append((r, at, len(example.input_ids)))
            at += len(example.input_ids)
    return tensors | {"sample_ids": torch.tensor(ids), "sample_spans": torch.tensor(spans)}


@torch.no_grad()
def separates_documents(model: Any) -> str | None:
    """None, or a sentence why this model must not be given packed rows. One forward pass over 2 x 8 tokens.

    The second row differs from the first in its first document and in its last token; the logits of the second
    document before that token must not differ.
    """
    device = next(model.parameters()).device
    a = torch.arange(1, 9, device=device)[None] % model.get_input_embeddings().num_embeddings
    b = a.clone()
    b[0, :4] = a[0, :4].flip(0)
    b[0, 7] = a[0, 0]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    with evaluation_mode(model):
        try:
            rows = [model(input_ids=ids, position_ids=positions, use_cache=False).logits for ids in (a, b)]
        except TypeError:
            return "it takes no position_ids"
    out = [logits[0, 4:7].float() for logits in rows]
    # rounding may differ where tokens are grouped by value (mixtures of experts); a leak is far larger
    allowed = 8 * torch.finfo(model.dtype).eps * float(out[0].abs().max())
    return None if float((out[0] - out[1]).abs().max()) <= allowed else "a document sees another one or a later token"


def check_packing(model: torch.nn.Module) -> None:
    reason = separates_documents(model)
    if reason:
        raise EfftuneError(f"This model cannot take packed rows ({reason}); use --no-packing.")
