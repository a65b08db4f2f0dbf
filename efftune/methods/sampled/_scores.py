"""Which tokens' gradients are expected to be large: one number per (sample, token), shared by all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOOR = 0.1  # of the mean score, added to each: a token whose gradient was zero may have one today


class TokenScores:
    """Gradient norms of tokens, remembered from one epoch to the next under the ids of their samples.

    `begin(batch)` looks up the scores of a batch, `observe(dh)` adds what a block's backward sees, `end()` stores it.
    A sample seen for the first time counts with the mean of the others; while nothing is known, layers use the norms of
    their inputs alone. Scores steer the variance of a sampled gradient, never its mean.

    Bytes: 2 per token of the data that has been seen, on the device of the gradients.
    """

    def __init__(self) -> None:
        self.table: dict[int, Tensor] = {}  # sample id -> (tokens,) float16, relative to the batch's mean
        self.batches = {"scored": 0, "new": 0, "without_ids": 0}
        self._current: Tensor | None = None  # (B·T,) float32
        self._observed: Tensor | None = None  # (B, T) float32, sum of squares over the blocks
        self._batch: Any = None
        self._spans: list[tuple[int, int, int, int]] = []  # (sample id, row, first column, one past the last)

    def begin(self, batch: Any) -> None:
        """`batch` is a dict with `input_ids` (B, T), `sample_ids` (n,) and, unless each row is one sample,
        `sample_spans` (n, 3): row, first column, number of columns. The ids are read on the host."""
        if self._batch is batch:
            return  # for another wtacrs of the same recipe
        self._current, self._observed, self._spans, self._batch = None, None, [], batch
        shape = _shape(batch)
        if shape is None:
            self.batches["without_ids"] += 1
            return
        ids, spans = batch["sample_ids"].tolist(), batch.get("sample_spans")
        if spans is None:
            spans = [(row, 0, shape[1]) for row in range(shape[0])]
        else:
            spans = spans.tolist()
        self._spans = [(i, row, start, start + length) for i, (row, start, length) in zip(ids, spans, strict=True)]
        known = [span for span in self._spans if span[0] in self.table]
        self.batches["scored" if known else "new"] += 1
        if known:
            scores = torch.ones(shape, device=self.table[known[0][0]].device)
            for i, row, start, end in known:
                stored = self.table[i][: end - start]
                scores[row, start : start + len(stored)] = stored
            self._current = scores.flatten() + FLOOR

    def of_rows(self, x: Tensor) -> Tensor | None:
        """(M,) scores of the rows of x (..., K), or None where there are none for it."""
        current = self._current
        if current is None or current.numel() * x.shape[-1] != x.numel():
            return None
        return current if current.device == x.device else current.to(x.device)

    def observe(self, dh: Tensor) -> None:
        """dh (B, T, K): the gradient at a block's output."""
        if self._spans and dh.ndim == 3:
            squares = torch.linalg.vector_norm(dh, dim=-1, dtype=torch.float32).square_()
            if self._observed is None:
                self._observed = squares
            elif self._observed.shape == squares.shape:
                self._observed += squares

    def end(self) -> None:
        """Stores what was observed since `begin`, relative to the batch's mean: the loss's scale does not count."""
        if self._observed is not None:
            norms = self._observed.sqrt()
            norms = (norms / norms.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_(max=6e4).half()
            for i, row, start, end in self._spans:
                self.table[i] = norms[row, start:end].clone()
        self._current, self._observed, self._spans, self._batch = None, None, [], None

    def state_dict(self) -> dict[str, Any]:
        ids = list(self.table)
        values = [self.table[i] for i in ids]
        lengths = torch.tensor([len(v) for v in values], dtype=torch.int64)
        flat = torch.cat(values).cpu() if values else torch.empty(0, dtype=torch.float16)
        return {"ids": torch.tensor(ids, dtype=torch.int64), "lengths": lengths, "values": flat, **self.batches}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        parts = state["values"].to(device).split(state["lengths"].tolist())
        self.table = dict(zip(state["ids"].tolist(), parts, strict=True))
        self.batches = {name: int(state[name]) for name in self.batches}

    def __str__(self) -> str:
        counts = self.batches
        if not any(counts.values()):
            return "norms of inputs (no batch seen yet)"
        known = f"norms of inputs x remembered norms of gradients in {counts['scored']} batches"
        rest = f"norms of inputs alone in {counts['new']} (samples not seen before)"
        without = f" and in {counts['without_ids']} without sample_ids" if counts["without_ids"] else ""
        return f"{known}, {rest}{without}"


def _shape(batch: Any) -> tuple[int, int] | None:
    if not isinstance(batch, dict) or "sample_ids" not in batch:
        return None
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2 or ("sample_spans" not in batch and len(batch["sample_ids"]) != len(ids)):
        return None
    return tuple(ids.shape)
