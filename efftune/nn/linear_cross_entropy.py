"""The cross-entropy of a head, whatever module it is, without its logits: a tile of them exists at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils.checkpoint import checkpoint

from efftune.ops.linear_cross_entropy import linear_cross_entropy

TILE = 2**23  # logits at once of a head that is not a plain nn.Linear


def head_cross_entropy(
    head: Any, hidden: Tensor, targets: Tensor, softcap: float | None = None, reduction: str = "sum"
) -> Tensor:
    """Computes `linear_cross_entropy` of any head.

    Args:
        head: an nn.Linear; any other module from (M, K) to logits runs on TILE logits at a time, again in backward.
        hidden: (M, K).   targets: (M,) int64.   softcap, reduction: as `linear_cross_entropy` has them.
    Returns: () for "sum", (M,) for "none"; float32, or float64 for float64 logits.
    """
    if has_torch_function_variadic(hidden, targets):  # modes see the whole: when a tile runs again, they are off
        given = head, hidden, targets, softcap, reduction
        return handle_torch_function(head_cross_entropy, (hidden, targets), *given)
    if type(head) is nn.Linear:
        return linear_cross_entropy(hidden, head.weight, targets, head.bias, reduction=reduction, softcap=softcap)
    step = max(1, TILE // head.out_features)
    terms = [
        checkpoint(
            _tile_loss, head, softcap, hidden[a : a + step], targets[a : a + step], reduction, use_reentrant=False
        )
        for a in range(0, max(1, hidden.shape[0]), step)
    ]
    return torch.stack(terms).sum() if reduction == "sum" else torch.cat(terms)


def _tile_loss(head: nn.Module, softcap: float | None, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(capped(logits, softcap), targets, reduction=reduction)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Returns softcap · tanh(logits / softcap), or the logits themselves where softcap is None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
