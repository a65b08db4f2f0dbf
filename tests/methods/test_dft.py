"""DFT: the gradient is that of Σ p·(−log p) with p held fixed, whoever computes the cross entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.ops.linear_cross_entropy import linear_cross_entropy
from efftune.train.task import CAUSAL_LM, CLASSIFICATION
from tests.methods.models import batch, llama, loss_fn


def gradients(model, recipe, data, loss):
    torch.manual_seed(3)
    tuner = efftune.apply(model, recipe, blocks=False)
    value = tuner.backward(data, loss)
    return float(value), {name: p.grad for name, p in tuner.named_trained().items()}


def by_formula(reduce):
    """The loss of a causal language model, from its logits."""

    def loss(model, ids):
        logits = model(input_ids=ids).logits[:, :-1].double().flatten(0, 1)
        log_p = logits.log_softmax(-1).gather(1, ids[:, 1:].reshape(-1, 1)).squeeze(1)
        weighted = reduce(-log_p.detach().exp() * log_p)
        return reduce(-log_p).detach() + weighted - weighted.detach()

    return loss


def labelled(ids):
    return {"input_ids": ids, "labels": ids}


LOSSES = {
    "hugging-face": (loss_fn, lambda ids: ids, torch.mean),
    "hugging-face-num-items": (
        lambda m, ids: m(input_ids=ids, labels=ids, num_items_in_batch=10).loss, lambda ids: ids, lambda t: t.sum() / 10
    ),
    "trainer": (CAUSAL_LM.loss, labelled, torch.sum),
}  # fmt: skip


RECIPES = "full", "lora(r=4)", "lora(r=4, target_modules='lm_head|q_proj')", "full + recompute"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("loss, make, reduce", LOSSES.values(), ids=LOSSES)
def test_gradients_are_those_of_the_formula(recipe, loss, make, reduce):
    """LoRA on the head makes the trainer's loss run tile by tile, and again in backward."""
    ids = batch()
    value, found = gradients(llama(), f"{recipe} + dft", make(ids), loss)
    expected, exact = gradients(llama().double(), recipe, ids, by_formula(reduce))
    assert value == pytest.approx(expected, rel=1e-6)
    for name, g in found.items():
        error = (g.double() - exact[name].double()).norm() / exact[name].double().norm().clamp_min(1e-12)
        assert error < 1e-5, (name, float(error))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_both_cross_entropies_with_ignored_tokens_and_weights(reduction):
    hidden, weight = torch.randn(12, 8), nn.Parameter(torch.randn(20, 8))
    targets = torch.randint(0, 20, (12,))
    targets[3:6] = -100
    each = torch.rand(12)
    head = nn.Linear(8, 20, bias=False)
    head.weight = weight

    def naive(model, _):
        terms = F.cross_entropy(hidden @ model.weight.t(), targets, reduction="none")
        weighted = terms * (-terms.detach()).exp()
        terms = terms.detach() + weighted - weighted.detach()
        return {"mean": terms.sum() / 9, "sum": terms.sum(), "none": (terms * each).sum()}[reduction]

    def by_torch(model, _):
        loss = F.cross_entropy(hidden @ model.weight.t(), targets, reduction=reduction)
        return (loss * each).sum() if reduction == "none" else loss

    def fused(model, _):
        if reduction == "none":
            return linear_cross_entropy(hidden, model.weight, targets, reduction="sum", token_weights=each)
        return linear_cross_entropy(hidden, model.weight, targets, reduction=reduction)

    def run(recipe, loss):
        head.weight.grad = None
        tuner = efftune.apply(nn.Sequential(head), recipe, blocks=False)
        value = tuner.backward(None, lambda m, b: loss(m[0], b))
        return value, head.weight.grad

    expected = run("full", naive)
    for loss in (by_torch, fused):
        torch.testing.assert_close(run("full + dft", loss), expected, rtol=1e-5, atol=1e-6)


def test_a_classifier_and_its_evaluation():
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3), {"x": torch.randn(8, 4), "labels": torch.randint(0, 3, (8,))}

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **inputs):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.inner(data["x"]))

    wrapped = Wrapped()
    tuner = efftune.apply(wrapped, "full + dft")
    shown = tuner.backward(data, CLASSIFICATION.loss)
    p = torch.softmax(wrapped.inner(data["x"]), 1).gather(1, data["labels"][:, None]).squeeze(1)
    torch.testing.assert_close(shown, -p.log().sum().detach())
    weight = wrapped.inner.weight
    torch.testing.assert_close(weight.grad, torch.autograd.grad(-p.sum(), weight)[0])


def test_what_it_cannot_weight_is_refused():
    with pytest.raises(EfftuneError, match="dft: forward passes alone cannot hold the factor fixed"):
        efftune.apply(llama(), "dft + mezo")
    tuner = efftune.apply(nn.Sequential(nn.Linear(4, 3)), "full + dft")
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    with pytest.raises(EfftuneError, match="the loss function called none"):
        tuner.backward(x, lambda m, x: m(x).square().mean())
    for settings in ({"label_smoothing": 0.1}, {"weight": torch.ones(3)}):
        with pytest.raises(EfftuneError, match="label smoothing, class weights"):
            tuner.backward(x, lambda m, x, s=settings: F.cross_entropy(m(x), y, **s))
    with pytest.raises(EfftuneError, match="probabilities as targets"):
        tuner.backward(x, lambda m, x: F.cross_entropy(m(x), torch.full((5, 3), 1 / 3)))


def test_a_loop_of_its_own_is_told():
    tuner = efftune.apply(llama(), "lora(r=4) + dft")
    optimizer = tuner.optimizer(lr=1e-3)
    loss_fn(tuner.model, batch()).backward()
    with pytest.warns(UserWarning, match="it trains on the plain loss"):
        optimizer.step()
