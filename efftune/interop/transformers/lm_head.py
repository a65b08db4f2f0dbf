"""The loss of a Hugging Face causal language model without its logits.

The model's own forward runs, asked for the logits of the last position only; a hook takes the hidden states of all
positions from its base model, and head and loss follow together. That is right only if the model does nothing to its
logits but what is done here. What can be seen is looked at (another kind of head, hooks); what cannot (a scale in the
middle of some forward) shows in the logits of the last position, which are compared at the first call.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from efftune.hooks import called, unhooked, watched
from efftune.nn.linear_cross_entropy import capped, head_cross_entropy
from efftune.random_state import generators, set_generators

ALL_ZERO = "its logits are all 0, which says nothing about how they are made"

# model -> (head, softcap) at the time of the comparison, and None or the reason it found
_COMPARED: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, str | None]] = weakref.WeakKeyDictionary()


def lm_head_loss(model: Any, inputs: dict[str, Any], counted: Tensor, targets: Tensor) -> Tensor | None:
    """Returns the sum over the counted positions of the cross-entropy of the model's next-token logits, or None: then
    the caller takes the model's own logits, for the reason that `lm_head_why_not(model)` gives afterwards.

    Args:
        inputs: what model(**inputs) would get, without labels.   counted: (C,) int64, positions in the flattened
        (B·T,) that have a loss.   targets: (C,) int64, what they predict.
    Returns: 0-d, float32 (float64 for a float64 model), differentiable in everything that trains, the head included;
        or None.
    Numerics, saved for backward: an nn.Linear head as `linear_cross_entropy`. Any other head (an efftune.Linear with an
        adapter or a quantised weight) runs as it is, on a tile of logits at a time, and again in backward.
    Raises: as the model and `linear_cross_entropy` do.
    """
    if lm_head_why_not(model) is not None:
        return None
    head, softcap = model.get_output_embeddings(), _softcap(model)
    compared = _COMPARED.get(model, ((), None))[0] == _key(model)
    before = generators(counted.device)
    with unhooked(head):  # these logits serve to compare, if at all
        hidden, last = _forward(model, inputs)
        reason = None if compared else _compare(head, softcap, hidden, last)
    if not compared:
        if reason != ALL_ZERO:  # a head that starts at 0 will say more later
            _COMPARED[model] = _key(model), reason
        if reason is not None:
            set_generators(before, counted.device)  # the caller's forward draws the same numbers
            return None
    assert hidden is not None  # compared
    hidden = hidden.flatten(0, 1).index_select(0, counted)
    return called(head, lambda: head_cross_entropy(head, hidden, targets, softcap))


def lm_head_why_not(model: Any) -> str | None:
    """Why the loss has to take the model's own logits, as a sentence, or None. What only a call can show is known after
    the first `lm_head_loss`."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return "it is not a Hugging Face model"
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(model, model.base_model_prefix, None), nn.Module):
        return "it does not consist of a base model and a head"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "it cannot be asked for fewer logits"
    for name, module in (("the model", model), ("its head", head)):
        if watched(module):
            return f"{name} has hooks, which would not see all logits"
    if type(head) is not nn.Linear:
        reason = _adapted_why_not(head)
        if reason is not None:
            return reason
    key, reason = _COMPARED.get(model, ((), None))
    return reason if key == _key(model) else None


def _adapted_why_not(head: Any) -> str | None:
    if not all(hasattr(head, name) for name in ("base", "delta", "keep", "out_features")):  # an efftune.Linear
        return f"its head is a {type(head).__name__}"
    if head.delta.random or head.keep.random:
        return "its head draws random numbers, which would differ from tile to tile"
    low = [name for name, p in head.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
    if low:
        return f"the gradients of the tiles would be added up in 16 bits in its head's {', '.join(low)}"
    return None


def _softcap(model: Any) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def _key(model: Any) -> tuple:
    return id(model.get_output_embeddings()), _softcap(model)


def _forward(model: Any, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
    """Returns the hidden states (B, T, K) that the head would get, and the model's own logits of the last position
    (B, 1, V)."""
    taken = []

    def take(module: nn.Module, args: tuple, output: Any) -> None:
        taken.append(output[0])  # last_hidden_state, in an output class and in a tuple

    handle = getattr(model, model.base_model_prefix).register_forward_hook(take)
    try:
        logits = model(**inputs, logits_to_keep=1).logits
    finally:
        handle.remove()
    return taken[0] if len(taken) == 1 else None, logits


@torch.no_grad()
def _compare(head: nn.Module, softcap: float | None, hidden: Tensor | None, model_logits: Tensor) -> str | None:
    """Says how the model's logits of the last position differ from those of its head, or None. Both sides do the same
    product, so that they differ by roundings of the cap at most."""
    if hidden is None:
        return "its base model does not run once, as a module, in its forward"
    logits = capped(head(hidden[:, -1:]), softcap)
    if model_logits.shape != logits.shape:
        return "its logits are not those of its head"
    largest = model_logits.abs().max()
    if largest == 0:
        return ALL_ZERO
    if not (model_logits - logits).abs().max() <= 8 * torch.finfo(model_logits.dtype).eps * largest:
        return "its logits are not those of its head (some models scale them)"
    return None
