"""A recipe's plan: the model is only read, the order of terms changes nothing, and what is not reached is said."""

import itertools
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import efftune
from efftune import EfftuneError
from efftune.linear import Linear, LoRA
from efftune.methods._base import TRAINS, Method, State
from efftune.recipe import parse
from efftune.summary import unreached
from efftune.tuner import CLOCK, planned
from tests.methods import matrix
from tests.methods.models import batch, contract_model, llama, prepared, train

SETTINGS = "lora(r=4, lora_dropout=0.1)", "lora(r=2, target_modules='q_proj')", "full(target_modules='mlp')"
TERMS = [*map(matrix.term, matrix.available()), *SETTINGS, "vcas(interval=0, sample_ratio=0.5)"]


def table(methods):
    """What a recipe wants, or how it is refused."""
    try:
        plan = planned(matrix._model(), methods)[1]
    except EfftuneError:
        return None
    layers = {name: (r.base, r.delta, r.keep, r.is_replaced) for name, r in plan.layers.items()}
    return layers, set(plan.parameters), plan.again, {name: keep for name, (keep, _) in plan.in_blocks.items()}


@pytest.mark.parametrize("others", ["", "lora(r=4)", "int8(group=16) + lora(r=4)"])
def test_the_order_of_terms_changes_nothing(others):
    """For every two terms, alone and beside others: the same plan, or refused in both orders."""
    accepted, rest = 0, parse(others) if others else []
    for one, other in itertools.combinations(TERMS, 2):
        methods = [*parse(one), *parse(other), *rest]
        expected = table(methods)
        accepted += expected is not None
        for order in (methods[::-1], [*methods[1:], methods[0]])[: len(methods) - 1]:  # of two, both are one
            assert table(order) == expected, order
    assert accepted > 20


def test_a_plan_reads_the_model_and_changes_nothing():
    model = contract_model(layers=2)
    before = {id(m): dict(vars(m), _modules=dict(m._modules)) for m in model.modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for recipe in matrix.RECIPES:
        planned(model, recipe)
    assert {id(m): dict(vars(m), _modules=dict(m._modules)) for m in model.modules()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_each_layer_is_made_once(monkeypatch):
    made = []
    from_linear = Linear.from_linear.__func__

    def counting(cls, layer, *axes):
        made.append(id(layer))
        return from_linear(cls, layer, *axes)

    monkeypatch.setattr(Linear, "from_linear", classmethod(counting))
    model = llama()
    layers = {id(m) for n, m in model.named_modules() if n.endswith("_proj")}
    efftune.apply(model, "mesa + wtacrs(ratio=0.5) + lora(r=4) + int8")
    assert len(made) == len(layers) and set(made) == layers


@dataclass(frozen=True)
class Wide(Method):
    """Another adapter for the same layers."""

    name = "wide"
    phase = TRAINS

    def plan(self, plan):
        plan.wish(self, plan.targets(self, "up_proj"), delta=LoRA(r=8))


def test_two_methods_that_want_different_things_are_named_with_the_layer():
    with pytest.raises(EfftuneError, match=r"layers.0.mlp.up_proj is already trained as LoRA\(r=4\) by lora, .* wide"):
        efftune.apply(llama(), [*parse("lora(r=4)"), Wide()])


# What is not reached


def test_the_summary_says_what_a_recipe_does_not_reach():
    tuner = efftune.apply(llama(), "lora(r=4, target_modules='q_proj|v_proj')")
    text = tuner.summary()
    assert "not reached" in text and "the output head: lm_head.weight" in text
    assert "embeddings: model.embed_tokens.weight" in text
    assert "linear layers that no target_modules means: model.layers.0.self_attn.k_proj.weight and 14 more" in text
    assert "not reached" not in efftune.apply(llama(), "mezo").summary()
    text = efftune.apply(llama(), "int8 + lora(r=4)").summary()
    assert "linear layers" not in text.split("not reached")[1]


class Odd(nn.Module):
    """Weights that no recipe for linear layers can mean."""

    class Special(nn.Linear):
        pass

    def __init__(self):
        super().__init__()
        self.special, self.plain = Odd.Special(4, 4), nn.Linear(4, 4)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(3, 4, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.classifier = nn.Sequential(nn.Linear(4, 2))

    def forward(self, x):
        return self.classifier(self.plain(self.special(x)) @ self.experts.weight[0])


def test_each_entry_is_counted_once_with_its_reason():
    model = Odd()
    entries = sum(p.numel() for p in model.parameters())
    tuner = efftune.apply(model, "lora(r=2, modules_to_save=[])")
    found, total = unreached(tuner.model, set(tuner.named_trained()))
    assert total == entries and sum(sum(names.values()) for names in found.values()) == entries - 16  # but for `plain`
    by_name = {name: reason for reason, names in found.items() for name in names}
    assert "subclass of nn.Linear" in by_name["special.weight"] and "3 dimensions" in by_name["experts.weight"]
    assert "without calling" in by_name["attention.in_proj_weight"]
    assert "without calling" in by_name["attention.out_proj.weight"]
    assert by_name["classifier.0.weight"] == "the classification head"
    assert by_name["plain.bias"] == "vectors (norms, biases)"


@pytest.mark.parametrize("tie", [False, True])
def test_shares_in_the_summary_are_of_the_models_own_parameters(tie):
    """So that what trains and what is not reached add up to the whole, and adapters are measured against the model."""
    entries = sum(p.numel() for p in llama(tie).parameters())
    head = efftune.apply(llama(tie), "full(target_modules='mlp')")
    reached = sum(p.numel() for p in head.named_trained().values())
    text = head.summary()
    assert f"({100 * reached / entries:.2f} % of the model's own)" in text
    assert f"not reached, {100 * (entries - reached) / entries:.2f} % of the model's own parameters" in text
    tuner = efftune.apply(llama(tie), "lora(r=4, target_modules='q_proj|lm_head')")
    added = sum(p.numel() for p in tuner.named_trained().values())
    assert f"({100 * added / entries:.2f} % of the model's own)" in tuner.summary()
    assert unreached(tuner.model, set(tuner.named_trained()))[1] == entries


def test_what_trains_and_gets_no_gradient_is_named_once():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    tuner = efftune.apply(Unused(), "full")
    optimizer = tuner.optimizer(lr=0.1)
    tuner.backward(torch.randn(2, 4), lambda m, x: m(x).square().mean())
    with pytest.warns(UserWarning, match="unused.weight, unused.bias train and got no gradient in the first step"):
        optimizer.step()
    with warnings.catch_warnings(action="error"):
        optimizer.step()


# The clock


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@dataclass
class Count(State):
    steps: int = 0
    mean: torch.Tensor | None = None
    _scratch: int = 0


@dataclass(frozen=True)
class Counts(Method):
    name = "counts"
    State = Count

    def after_step(self, run):
        own = run.state(self)
        own.steps, own._scratch = own.steps + 1, 7
        own.mean = torch.full((2,), float(own.steps))


@pytest.mark.parametrize("recipe", ["full", "mezo"])
def test_the_optimizers_state_dict_carries_the_clock_and_what_was_learnt(recipe, tmp_path):
    tuner = efftune.apply(llama(), [*parse(recipe), Counts()])
    optimizer = tuner.optimizer(lr=1e-3)
    train(tuner, optimizer, 3, batch())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = efftune.apply(llama(), [Counts(), *parse(recipe)])
    resumed = again.optimizer(lr=1e-3)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    own = again.run.state(Counts())
    assert again.step == 3 and own.steps == 3 and own.mean.tolist() == [3.0, 3.0] and own._scratch == 0
    train(again, resumed, 1, batch())
    assert own.steps == 4
    plain = torch.optim.AdamW(llama().parameters())  # without a recipe the key is no hindrance
    plain.load_state_dict({**plain.state_dict(), CLOCK: resumed.state_dict()[CLOCK]})


def test_an_optimizers_state_of_other_shapes_is_refused_before_the_clock_moves():
    tuner = prepared(llama(), "lora(r=2)")
    optimizer = tuner.optimizer(lr=1e-3)
    train(tuner, optimizer, 2, batch())
    other = prepared(llama(), "lora(r=4)")
    with pytest.raises(
        EfftuneError, match=r"exp_avg \(2, 32\) for a parameter of \(4, 32\), so that it is of another recipe"
    ):
        other.optimizer(lr=1e-3).load_state_dict(optimizer.state_dict())
    fewer = prepared(llama(), "lora(r=2, target_modules='q_proj')")
    with pytest.raises(ValueError):
        fewer.optimizer(lr=1e-3).load_state_dict(optimizer.state_dict())
    assert other.step == fewer.step == 0


def test_the_state_of_another_recipe_is_refused_and_that_of_an_older_version_is_read():
    tuner = prepared(llama(), "full + vcas(interval=2)")
    train(tuner, tuner.optimizer(lr=1e-3), 3, batch(rows=8))
    state = tuner.state_dict()
    with pytest.raises(EfftuneError, match="a recipe with vcas, and this one is 'lora"):
        prepared(llama(), "lora(r=4)").load_state_dict(state)
    for older in ({"step": 3}, {"step": 3, "methods": [{}, state["methods"]["vcas"]]}):  # it had a list
        again = prepared(llama(), "full + vcas(interval=2)")
        again.load_state_dict(older)
        assert again.step == 3
    assert pytree.tree_all(bool, pytree.tree_map(same, again.state_dict(), state))
