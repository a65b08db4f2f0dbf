"""The chain of backward: what a method hands on is what those inside it work with, whatever the recipe's order."""

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import efftune
from efftune import EfftuneError
from efftune.methods._base import CHANGES, ESTIMATES, Method
from efftune.recipe import parse
from tests.methods.models import batch, llama, loss_fn


@dataclass(frozen=True)
class Weighted(Method):
    """Each token's loss times its own probability, detached (Wu et al. 2025, arXiv:2508.05629)."""

    name = "weighted"
    place = CHANGES

    def backward(self, micro, inner):
        return inner(dataclasses.replace(micro, loss=weighted_loss))


@dataclass(frozen=True)
class Skips(Method):
    below: float = 100.0

    name = "skips"
    place = CHANGES

    def backward(self, micro, inner):
        with torch.no_grad():
            loss = micro.loss(micro.model, micro.batch)
        return loss if loss < self.below else inner(micro)


@dataclass(frozen=True)
class Listens(Method):
    name = "listens"

    def backward(self, micro, inner):
        SEEN.append((micro.run.step, micro.last, micro.scale, micro.loss is weighted_loss))
        return inner(micro)


@dataclass(frozen=True)
class Twice(Method):
    name = "twice"
    place = ESTIMATES

    def backward(self, micro, inner):
        inner(dataclasses.replace(micro, scale=micro.scale / 2))
        return inner(dataclasses.replace(micro, scale=micro.scale / 2))


SEEN: list = []


def weighted_loss(model, ids):
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
    each = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return (each * (-each.detach()).exp()).mean()


def gradients(methods, loss=loss_fn):
    torch.manual_seed(3)
    tuner = efftune.apply(llama(), methods)
    tuner.optimizer(lr=1e-3)
    value = tuner.backward(batch(), loss)
    return value, {name: p.grad for name, p in tuner.named_trained().items()}


@pytest.mark.parametrize("order", list(itertools.permutations([Weighted(), Twice(), Listens(), *parse("lora(r=4)")])))
def test_the_order_of_a_recipe_changes_nothing(order):
    SEEN.clear()
    value, grads = gradients(list(order))
    right, expected = gradients(parse("lora(r=4)"), weighted_loss)
    assert SEEN == [(0, True, 1.0, True)]  # once, inside what changes the loss, outside what repeats
    torch.testing.assert_close(value, right)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("recipe", ["mezo(eps=1e-2)", "full + vcas(interval=2)", "full + mesa(bits=8, max_error=0.5)"])
def test_estimators_and_measurements_work_with_the_loss_that_is_handed_on(recipe):
    given, right = [], []
    for methods, loss, losses in (([Weighted()], loss_fn, given), ([], weighted_loss, right)):
        torch.manual_seed(3)
        tuner = efftune.apply(llama(), [*methods, *parse(recipe)])
        optimizer = tuner.optimizer(lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(float(tuner.backward(batch(), loss)))
            optimizer.step()
    assert given == right


def test_what_skips_a_micro_batch_leaves_no_gradient_and_trains_nothing_in_zeroth_order():
    value, grads = gradients([Skips(), *parse("full")])
    assert value > 0 and all(grad is None for grad in grads.values())
    tuner = efftune.apply(llama(), [Skips(), *parse("mezo")])
    optimizer = tuner.optimizer(lr=1e-3)
    before = {name: p.detach().clone() for name, p in tuner.named_trained().items()}
    tuner.backward(batch(), loss_fn)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in tuner.named_trained().items())


def test_two_that_estimate_the_gradient_are_refused():
    with pytest.raises(EfftuneError, match="twice and vcas each bring their own backward"):
        efftune.apply(llama(), [Twice(), *parse("full + vcas")])
