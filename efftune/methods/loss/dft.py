"""DFT: each token's loss counts as much as the model believes in the token."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from efftune.errors import EfftuneError
from efftune.methods._base import CHANGES, ESTIMATES, Method, State
from efftune.nn.linear_cross_entropy import head_cross_entropy
from efftune.ops.linear_cross_entropy import linear_cross_entropy


@dataclass
class Called(State):
    _called: bool = False


@dataclass(frozen=True)
class Dft(Method):
    """Dynamic fine-tuning multiplies the cross entropy of each token by the token's own probability, which takes part
    in no gradient:

        loss = Σ_i p_i · (−log p_i) / n,    ∂loss/∂θ = −Σ_i ∂p_i/∂θ / n,    p_i detached as a weight

    The gradient of −log p is ∂p/p: a token that the model thinks impossible pulls with a weight of 1/p. The factor p
    takes that out, so that the model learns from what it could have said and little from noise. It suits targets that
    are nearly right (reasoning traces of a stronger model) and does not suit new facts, whose tokens begin at p ≈ 0.

    The losses that are weighted are those of every `torch.nn.functional.cross_entropy` with class indices, and of
    `efftune.ops.linear_cross_entropy`, that the loss function calls: those of Hugging Face's models and of the trainer.
    "mean" stays a mean over the tokens that count. The loss that a step reports is the weighted one; evaluation is not.

    Memory: one float32 a token.   Cost: none to speak of.
    Raises: EfftuneError for a loss without such a cross entropy, or one with label smoothing or class weights, where
        the loss is not −log p; and in a zeroth-order recipe, whose differences of losses see the factor change as well.
    Source: Wu et al. 2025, arXiv:2508.05629, equation 9.
    """

    name = "dft"
    place = CHANGES
    State = Called

    def why_not(self, others):
        if any(other.place == ESTIMATES and other.overrides("optimizer") for other in others):
            return "forward passes alone cannot hold the factor fixed; leave out one of the two methods"
        return None

    def backward(self, micro, inner):
        def loss(model, batch):
            with Weighted() as weighted:
                value = micro.loss(model, batch)
            if not weighted.seen:
                raise EfftuneError(
                    "dft weights the tokens of a cross entropy, and the loss function called none (torch.nn.functional."
                    "cross_entropy, or efftune.ops.linear_cross_entropy); train on such a loss, or leave dft out."
                )
            return value

        micro.run.state(self)._called = True
        return inner(dataclasses.replace(micro, loss=loss))

    def after_step(self, run):
        if run.step == 0 and not run.state(self)._called:
            warnings.warn(
                "dft weights tokens in tuner.backward(batch, loss_fn), which this loop does not call: it trains on the "
                "plain loss.",
                stacklevel=2,
            )


class Weighted(TorchFunctionMode):
    """Within it, cross entropies are weighted by the probability of their targets."""

    seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (F.cross_entropy, linear_cross_entropy, head_cross_entropy):
            return func(*args, **kwargs or {})
        self.seen = True
        given = inspect.signature(func).bind(*args, **kwargs or {})
        given.apply_defaults()
        return weighted(func, given.arguments)


def weighted(func: Any, given: dict[str, Any]) -> Tensor:
    """func(**given), a cross entropy, with each term multiplied by exp(−term)."""
    targets = given["target"] if func is F.cross_entropy else given["targets"]
    classes = given["weight"] if func is F.cross_entropy else None
    if given.get("label_smoothing") or classes is not None or targets.is_floating_point():
        raise EfftuneError(
            "dft's factor is the probability of the target, which a cross entropy with label smoothing, class weights "
            "or probabilities as targets does not tell; leave those out, or leave dft out."
        )
    each, count = given.get("token_weights"), given.get("num_items")
    plain = {name: None for name in ("token_weights", "num_items") if name in given}
    terms = func(**{**given, **plain, "reduction": "none"})
    terms = terms * torch.exp(-terms.detach()) * (1 if each is None else each.detach())
    if given["reduction"] == "none":
        return terms
    if given["reduction"] == "sum":
        return terms.sum()
    return terms.sum() / ((targets != given["ignore_index"]).sum() if count is None else count)
