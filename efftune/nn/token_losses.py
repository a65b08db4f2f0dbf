"""The cross entropies that a loss function calls, token by token, whoever wrote it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from efftune.nn.linear_cross_entropy import head_cross_entropy
from efftune.ops.linear_cross_entropy import linear_cross_entropy

CROSS_ENTROPIES = (F.cross_entropy, linear_cross_entropy, head_cross_entropy)


class CrossEntropy:
    """One call of a cross entropy: the function, and all of its arguments by name."""

    def __init__(self, func: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]):
        self.func = func
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        self.given = bound.arguments
        self.targets: Tensor = self.given["target" if func is F.cross_entropy else "targets"]

    @property
    def is_log_probability(self) -> bool:
        """Whether each term is −log p of its target: no smoothing, no class weights, no probabilities as targets."""
        weighted = self.func is F.cross_entropy and self.given["weight"] is not None
        return not (self.given.get("label_smoothing") or weighted or self.targets.is_floating_point())

    def terms(self) -> Tensor:
        """The terms, one for each target, 0 for an ignored one, without weights of tokens."""
        plain = {name: None for name in ("token_weights", "num_items") if name in self.given}
        return self.func(**{**self.given, **plain, "reduction": "none"})

    def counts(self) -> Tensor:
        """Which targets are not ignored."""
        return self.targets != self.given.get("ignore_index", -100)

    def reduced(self, terms: Tensor) -> Tensor:
        """What the call would have returned, had its terms been these."""
        weights, items = self.given.get("token_weights"), self.given.get("num_items")
        if weights is not None:
            terms = terms * weights.detach().to(terms.dtype)
        if self.given["reduction"] == "none":
            return terms
        if self.given["reduction"] == "sum":
            return terms.sum()
        return terms.sum() / (self.counts().sum() if items is None else items)


class CrossEntropies(TorchFunctionMode):
    """Within it, `instead` answers each call of torch.nn.functional.cross_entropy and of efftune's."""

    def __init__(self, instead: Callable[[CrossEntropy], Tensor]):
        super().__init__()
        self.instead, self.calls = instead, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in CROSS_ENTROPIES:
            return func(*args, **kwargs or {})
        self.calls += 1
        return self.instead(CrossEntropy(func, args, kwargs or {}))
