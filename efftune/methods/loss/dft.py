"""DFT: each token's loss counts as much as the model believes in the token."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from efftune.errors import EfftuneError
from efftune.methods._base import CHANGES, ESTIMATES, Method, State
from efftune.nn.token_losses import CrossEntropies, CrossEntropy


@dataclass
class Called(State):
    _called: bool = False


@dataclass(frozen=True)
class Dft(Method):
    """Multiplies the cross entropy of each token by the token's own probability, which takes part in no gradient
    (dynamic fine-tuning).

        loss = Σ_i p_i · (−log p_i) / n,    ∂loss/∂θ = −Σ_i ∂p_i/∂θ / n,    p_i detached as a weight

    The gradient of −log p is ∂p/p: a token that the model thinks impossible pulls with a weight of 1/p. The factor p
    takes that out, so that the model learns from what it could have said and little from noise. It suits targets that
    are nearly right (reasoning traces of a stronger model) and does not suit new facts, whose tokens begin at p ≈ 0.

    The losses that are weighted are those of every `torch.nn.functional.cross_entropy` with class indices, and of
    `efftune.ops.linear_cross_entropy`, that the loss function calls: those of Hugging Face's models and of the trainer.
    "mean" stays a mean over the tokens that count. The loss that a step reports is the plain one, Σ −log p_i / n: the
    weighted one rises while p grows from 0 to 1/e, and tells nothing.

    Memory: one float32 a token.
    Cost: none to speak of.
    Raises: EfftuneError for a loss without such a cross entropy, or one with label smoothing or class weights, where
        the loss is not −log p; and in a zeroth-order recipe, whose differences of losses see the factor change as well.
    Source: Wu et al. 2025, arXiv:2508.05629, equation 9.
    """

    name = "dft"
    place = CHANGES
    State = Called
    verified = (
        "dft: gradients are held against the exact one of dft's own objective, Σ p · (−log p) with the factor p held "
        "fixed, and not against that of the plain loss."
    )

    def why_not(self, others):
        if any(other.place == ESTIMATES and other.overrides("optimizer") for other in others):
            return "forward passes alone cannot hold the factor fixed; leave out one of the two methods"
        return None

    def backward(self, micro, inner):
        def loss(model, batch):
            with CrossEntropies(weighted) as cross_entropies:
                value = micro.loss(model, batch)
            if not cross_entropies.calls:
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


def weighted(call: CrossEntropy) -> Tensor:
    """The value of the cross entropy, and the gradient of the one with each term multiplied by exp(−term)."""
    if not call.is_log_probability:
        raise EfftuneError(
            "dft's factor is the probability of the target, which a cross entropy with label smoothing, class weights "
            "or probabilities as targets does not tell; leave those out, or leave dft out."
        )
    terms = call.terms()
    weighted = call.reduced(terms * torch.exp(-terms.detach()))
    return call.reduced(terms.detach()) + (weighted - weighted.detach())
