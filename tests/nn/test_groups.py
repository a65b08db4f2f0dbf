"""Which layers of a model read one tensor is found by running outlines of its modules, and changes no gradient."""

import copy
import functools
import pickle
import random

import pytest
import torch
from torch import nn

import efftune
from efftune.interop.transformers import groups
from efftune.interop.transformers.groups import Siblings
from efftune.linear import Linear
from tests.nn.families import batch, loss, model

LORA = "lora(r=3, dtype=None)"


is_known = groups.is_known


@pytest.fixture(autouse=True)
def any_module(monkeypatch):
    """Modules of these tests are tried as those of transformers are."""
    monkeypatch.setattr(groups, "is_known", lambda module: True)


def siblings(module):
    hooks = [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
    return next((hook for hook in hooks if isinstance(hook, Siblings)), None)


def found(tuner):
    """The groups of all modules, by the names of their layers."""
    each = [siblings(module) for module in tuner.model.modules()]
    return [names for hooks in each if hooks is not None for names in hooks.names]


def alone_from_now(tuner):
    for hook in tuner.blocks.groups:
        hook.remove()


def gradients(tuner, call):
    call(tuner.model).backward()
    grads = {name: p.grad for name, p in tuner.named_trained().items()}
    for p in tuner.named_trained().values():
        p.grad = None
    return grads


def assert_same_alone(tuner, call):
    together = gradients(tuner, call)
    alone_from_now(tuner)
    alone = gradients(tuner, call)
    assert not any(siblings(module) for module in tuner.model.modules())
    assert together.keys() == alone.keys()
    for name, right in alone.items():
        torch.testing.assert_close(together[name], right, rtol=1e-9, atol=1e-12)


def fresh(tuner):
    for name, p in tuner.named_trained().items():
        if name.endswith("lora_b"):
            nn.init.normal_(p)
    return tuner


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("recipe", [LORA, "full", "int8(group=8) + " + LORA, LORA + " + recompute"])
def test_a_llama(recipe, attention):
    tuner = fresh(efftune.apply(model("Llama", torch.float64, attention=attention), recipe))
    tuner.model(**batch())
    assert found(tuner) == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2
    assert_same_alone(tuner, lambda m: loss(m, batch(padded=True)))


@pytest.mark.parametrize(
    "family, names",
    [
        ("Qwen3", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2),
        ("Gemma3", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2),
        ("Bert", [["query", "key", "value"]] * 2),
        ("GPT2", []),  # one layer for all three
    ],
)
def test_other_families(family, names):
    tuner = fresh(efftune.apply(model(family, torch.float64), LORA))
    tuner.model(**batch())
    assert found(tuner) == names
    assert_same_alone(tuner, lambda m: loss(m, batch()))


def test_an_encoder_and_a_decoder_that_looks_at_it():
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    tuner = fresh(efftune.apply(transformers.T5ForConditionalGeneration(config).double().train(), LORA))
    ids = batch()["input_ids"]
    tuner.model(input_ids=ids, labels=ids)
    assert found(tuner) == [["q", "k", "v"], ["q", "k", "v"], ["k", "v"]]
    assert_same_alone(tuner, lambda m: m(input_ids=ids, labels=ids[:, :9].contiguous()).loss)


def test_only_what_the_recipe_reaches():
    tuner = efftune.apply(model("Llama"), "lora(r=3, target_modules=['q_proj', 'v_proj', 'gate_proj', 'down_proj'])")
    tuner.model(**batch())
    inner = tuner.model.model.layers[0].self_attn
    assert siblings(inner).names == [["q_proj", "k_proj", "v_proj"]]
    seen = []
    inner.register_forward_pre_hook(lambda module, args: seen.append(vars(module.q_proj).get("group")))
    tuner.model(**batch())
    assert seen[0].layers == [inner.q_proj, inner.v_proj] and "group" not in vars(inner.q_proj)
    assert siblings(tuner.model.model.layers[0].mlp) is None


class Module(nn.Module):
    """Four layers as wide as each other; a subclass reads what it likes by them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.calls, self.rows = 0, []


class Order(Module):
    def forward(self, x):
        return self.d(x) + self.b(x.tanh()) + self.a(x)


class Twice(Module):
    def forward(self, x):
        return self.a(x) + self.b(x) + self.a(x)


class Views(Module):
    def forward(self, x):
        return self.a(x.view(-1, 8)) + self.b(x.view(-1, 8))


class InPlace(Module):
    def forward(self, x):
        x = x * 1
        y = self.a(x) + self.c(x)
        x.mul_(2)
        return y + self.b(x) + self.d(x)


class Values(Module):
    def forward(self, x):
        return self.a(x) + self.b(x) if x.sum() < 1e9 else x


class Fails(Module):
    def forward(self, x):
        self.calls += 1  # not of a copy
        self.rows.append(torch.rand(2))
        random.random()
        return self.a(x) + self.b(x)


class Weights(Module):
    def forward(self, x):
        return self.a(x) + nn.functional.linear(x, self.b.weight) + self.c(x)


@pytest.mark.parametrize(
    "kind, names",
    [
        (Order, [["d", "a"]]),
        (Twice, []),
        (Views, []),
        (InPlace, [["a", "c"], ["b", "d"]]),
        (Values, []),
        (Fails, [["a", "b"]]),
        (Weights, [["a", "c"]]),
    ],
)
def test_modules_of_all_sorts(kind, names):
    torch.manual_seed(0)
    plain = nn.Sequential(kind()).double()
    target = fresh(efftune.apply(plain, LORA.replace("None", "None, target_modules='a|b|c|d'")))
    assert isinstance(plain[0].a, Linear)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    state, other = torch.get_rng_state(), random.getstate()
    groups.readers(plain[0], (x,), {})
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == other
    assert plain[0].calls == 0 and plain[0].rows == []
    target.model(x)
    assert found(target) == names
    if kind is not InPlace:  # an adapter's gradient takes the x that is no more
        assert_same_alone(target, lambda m: m(x).square().sum())


def test_a_block_that_is_run_again_gives_the_same_bits():
    found = []
    for recipe in (LORA, LORA + " + recompute"):
        torch.manual_seed(0)
        tuner = efftune.apply(model("Llama"), recipe)
        torch.manual_seed(1)
        found.append(gradients(fresh(tuner), lambda m: loss(m, batch())))
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())


def test_a_copy_has_groups_of_its_own():
    tuner = fresh(efftune.apply(model("Llama"), LORA))
    loss(tuner.model, batch())
    for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = make(tuner.model)
        for p in tuner.named_trained().values():
            p.grad = None
        loss(tuner.model, batch()).backward()
        right = {name: p.grad for name, p in tuner.named_trained().items()}
        for p in tuner.named_trained().values():
            p.grad = None
        loss(twin, batch()).backward()
        own = dict(twin.named_parameters())
        assert all(torch.equal(own[name].grad, grad) for name, grad in right.items())
        assert all(p.grad is None for p in tuner.named_trained().values())


def test_a_second_recipe_and_the_way_back():
    tuner = efftune.apply(model("Llama"), LORA)
    efftune.apply(tuner.model, LORA)
    attention = tuner.model.model.layers[0].self_attn
    assert len(attention._forward_hooks) == len(attention._forward_pre_hooks) == 1
    tuner.remove()
    assert not attention._forward_hooks and not attention._forward_pre_hooks


def test_a_layer_that_was_put_there_since():
    tuner = fresh(efftune.apply(model("Llama", torch.float64), LORA))
    tuner.model(**batch())
    attention = tuner.model.model.layers[0].self_attn
    attention.k_proj = nn.Linear(32, 16, bias=False, dtype=torch.float64)
    assert_same_alone(tuner, lambda m: loss(m, batch()))


def test_after_an_exception_nobody_is_in_a_group():
    tuner = efftune.apply(model("Llama"), LORA)
    tuner.model(**batch())
    attention = tuner.model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuner.model(**batch())
    assert not any("group" in vars(m) for m in tuner.model.modules())


def test_compiled_without_a_break_and_as_alone():
    tuner = fresh(efftune.apply(model("Llama"), LORA))
    inner = tuner.model.model.layers[0].mlp
    x = torch.randn(2, 3, 32, requires_grad=True)
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert siblings(inner).names is None
    inner(x)
    assert torch.equal(compiled(x), y) and siblings(inner).names == [["gate_proj", "up_proj"]]


def test_perturbed_weights_are_those_of_every_layer():
    """With gradients recorded, as nobody does: what a sibling gives is of its perturbed weight all the same."""
    from tests.methods.perturbed import perturbed

    tuner = fresh(efftune.apply(model("Llama", torch.float64), LORA + " + mezo(eps=0.1)"))
    optimizer = tuner.optimizer(lr=0.1)
    tuner.model(**batch())
    with perturbed(tuner.model, optimizer, 0.5, seed=3):
        together = loss(tuner.model, batch())
    alone_from_now(tuner)
    with perturbed(tuner.model, optimizer, 0.5, seed=3):
        alone = loss(tuner.model, batch())
    assert (together - loss(tuner.model, batch())).abs() > 1e-3
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=0)


@functools.lru_cache
def remembered(width):
    return torch.linspace(0, 1, width)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return (self.q(x) + self.k(x)) * remembered(8)


def test_code_that_may_remember_what_it_makes_is_not_run_without_data(monkeypatch):
    monkeypatch.setattr(groups, "is_known", is_known)
    net = nn.Sequential(Remembers(), nn.LayerNorm(8))
    x = torch.randn(3, 8)
    expected = net(x)
    remembered.cache_clear()
    tuner = efftune.apply(net, "full")
    assert type(tuner.model(x).sum().item()) is float
    torch.testing.assert_close(tuner.model(x), expected)
    assert any(siblings(m) for m in efftune.apply(model("Llama"), LORA).model.modules())


def test_a_first_call_under_inference_mode_leaves_the_trial_to_the_next():
    tuner = efftune.apply(model("Llama"), LORA)
    with torch.inference_mode():
        tuner.model(**batch())
    loss(tuner.model, batch()).backward()
    assert found(tuner)


def test_autocast_that_begins_between_layers_ends_the_group():
    class Inside(Remembers):
        def forward(self, x):
            q = self.q(x)
            with torch.autocast("cpu", torch.bfloat16):
                return q, self.k(x)

    tuner = efftune.apply(nn.Sequential(Inside(), nn.LayerNorm(8)), "lora(r=2)")
    q, k = tuner.model[0](torch.randn(3, 8))
    assert q.dtype == torch.float32 and k.dtype == torch.bfloat16
