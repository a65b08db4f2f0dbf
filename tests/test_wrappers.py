"""Modules around modules: what torch.compile has wrapped is trained, what cannot be changed in place is untouched."""

import copy

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.linear import Linear
from efftune.nn.norm import LayerNorm


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Counting:
    """A backend of torch.compile that compiles nothing and counts the calls of what it was given."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.calls += 1
            return graph(*args)

        return run


def compiled(how, backend):
    model = Model()
    if how == "whole":
        return torch.compile(model, backend=backend)
    for i, layer in enumerate(model.layers):
        if how == "blocks":
            model.layers[i] = torch.compile(layer, backend=backend)
        else:
            layer.norm = torch.compile(layer.norm, backend=backend)
    return model


def trained(model, recipe, x):
    """Names and values of the tensors after a step of SGD."""
    torch.manual_seed(1)
    tuner = efftune.apply(model, recipe)
    optimizer = tuner.attach(torch.optim.SGD(tuner.param_groups(), lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        tuner.backward(x, lambda m, x: m(x).square().sum())
        optimizer.step()
    return tuner, tuner.model.state_dict()


@pytest.mark.parametrize("recipe", ["full", "lora(r=2)"])
@pytest.mark.parametrize("how", ["whole", "blocks", "norms"])
def test_a_compiled_model_trains_as_the_plain_one_and_stays_compiled(how, recipe):
    x, backend = torch.randn(3, 8), Counting()
    given = compiled(how, backend)
    tuner, got = trained(given, recipe, x)
    calls = backend.calls
    assert calls > 0
    expected = trained(Model(), recipe, x)[1]
    assert list(got) == list(expected)  # names without a wrapper in them
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
    torch.testing.assert_close(given(x), tuner.model(x))  # who holds the wrapper calls what is trained
    assert backend.calls > calls
    norms = [type(layer.norm) for layer in tuner.model.layers]
    assert norms == [nn.LayerNorm if how == "norms" else LayerNorm] * 2
    torch._dynamo.reset()


def test_saved_from_a_compiled_model_and_loaded_into_one(tmp_path):
    x = torch.randn(3, 8)
    tuner, _ = trained(compiled("blocks", Counting()), "full", x)
    tuner.save(tmp_path)
    again = efftune.load(compiled("whole", Counting()), tmp_path)
    torch.testing.assert_close(again.model(x), tuner.model(x))
    torch._dynamo.reset()


def untouched(model, state):
    return all(torch.equal(t, state[n]) for n, t in model.state_dict().items()) and all(
        p.requires_grad for p in model.parameters()
    )


def test_a_refused_recipe_leaves_a_compiled_model_as_it_was():
    for how in ("whole", "blocks", "norms"):
        given = compiled(how, Counting())
        modules, state = list(given.modules()), copy.deepcopy(given.state_dict())
        with pytest.raises(EfftuneError, match="matches no linear layer"):
            efftune.apply(given, "lora(r=2, target_modules='nothing')")
        assert list(given.modules()) == modules and untouched(given, state)
        given(torch.randn(3, 8))
    torch._dynamo.reset()


def test_what_cannot_be_changed_in_place_is_refused_before_it_is_touched():
    class FullyShardedDataParallel(nn.Module):  # the real one takes a process group
        def __init__(self, module):
            super().__init__()
            self.module = module

    class Offloaded(Model):  # as accelerate's dispatch_model leaves it
        def __init__(self):
            super().__init__()
            self.layers[1].up._hf_hook = object()
            self.layers[1].up.weight = nn.Parameter(self.layers[1].up.weight.to("meta"))

    x, traced = torch.randn(3, 8), Model()
    traced.layers[0] = torch.jit.trace(traced.layers[0], x)
    cases = [
        (nn.DataParallel(Model()), r"the model \(DataParallel\) is wrapped for several devices"),
        (nn.Sequential(FullyShardedDataParallel(Block())), r"0 \(FullyShardedDataParallel\) is wrapped"),
        (torch.jit.script(nn.Sequential(nn.Linear(8, 8))), "is a torch.jit module, whose code is fixed"),
        (traced, r"layers.0 \(TopLevelTracedModule\) is a torch.jit module"),
        (Offloaded(), r"accelerate has offloaded the weights of layers.1.up \(Linear\)"),
    ]
    for model, sentence in cases:
        before = [(p, p.requires_grad, p.device) for p in model.parameters()]
        with pytest.raises(EfftuneError, match=sentence):
            efftune.apply(model, "lora(r=2)")
        assert all(
            p is q and r == q.requires_grad and d == q.device for (p, r, d), q in zip(before, model.parameters())
        )


HOOKS = (
    "forward", "forward_pre", "full_backward", "full_backward_pre", "state_dict_post", "state_dict_pre",
    "load_state_dict_post", "load_state_dict_pre",
)  # fmt: skip


@pytest.mark.parametrize("how, name", [("whole", "the model"), ("blocks", "layers.0"), ("norms", "layers.0.norm")])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_a_wrapper_are_refused_before_it_is_touched(kind, how, name):
    given = compiled(how, "eager")
    wrapper = next(m for m in given.modules() if isinstance(m, torch._dynamo.OptimizedModule))
    handle = getattr(wrapper, f"register_{kind}_hook")(lambda *_: None)
    modules, state = list(given.modules()), copy.deepcopy(given.state_dict())
    with pytest.raises(EfftuneError, match=rf"{name} \(OptimizedModule\) is torch.compile's wrapper.* module inside"):
        efftune.apply(given, "full")
    assert list(given.modules()) == modules and untouched(given, state)
    handle.remove()
    efftune.apply(given, "full")


@pytest.mark.parametrize("how", ["whole", "blocks", "norms"])
def test_a_hook_on_the_module_inside_is_called(how):
    given, x = compiled(how, "eager"), torch.randn(3, 8)
    wrapper = next(m for m in given.modules() if isinstance(m, torch._dynamo.OptimizedModule))
    wrapper._orig_mod.register_forward_hook(lambda module, args, y: y * 0)
    expected = given(x)
    tuner = efftune.apply(given, "full")
    assert expected.eq(0).all() == (how == "whole")
    torch.testing.assert_close(tuner.model(x), expected)
    torch._dynamo.reset()


class Redirecting(nn.Module):
    """Writes everything to the module inside, as wrappers do."""

    def __init__(self, inner):
        super().__init__()
        self._modules["inner"] = inner

    def __setattr__(self, name, value):
        inner = self.__dict__.get("_modules", {}).get("inner")
        super().__setattr__(name, value) if inner is None else setattr(inner, name, value)

    def forward(self, x):
        return self._modules["inner"](x)


@pytest.mark.parametrize("recipe", ["lora(r=2)", "int8(group=4) + lora(r=2)", "full"])
def test_an_assignment_of_the_models_own_is_not_called(recipe):
    inner = Model()
    state, x = copy.deepcopy(inner.state_dict()), torch.randn(3, 8)
    expected, model = inner(x), Redirecting(inner)
    tuner = efftune.apply(model, recipe)
    assert all(not p.is_meta for p in inner.parameters()) and any(isinstance(m, Linear) for m in inner.modules())
    torch.testing.assert_close(model(x), expected, **(dict(atol=0.05, rtol=0.05) if "int8" in recipe else {}))
    tuner.remove()
    assert inner.state_dict().keys() == state.keys() and not any(isinstance(m, Linear) for m in inner.modules())


@pytest.mark.parametrize("parametrize", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_modules_keep_what_they_compute(parametrize):
    model = Model()
    for layer in model.layers:
        getattr(torch.nn.utils.parametrizations, parametrize)(layer.up)
    x, expected = torch.randn(3, 8), model.eval()(torch.ones(1, 8))
    tuner = efftune.apply(model, "lora(r=2)")  # of the layers that are plain
    torch.testing.assert_close(model(torch.ones(1, 8)), expected)
    assert isinstance(model.layers[0].down, Linear) and not isinstance(model.layers[0].up, Linear)
    tuner.backward(x, lambda m, x: m(x).square().sum())
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(EfftuneError, match="0: it has hooks"):
        efftune.apply(old, "lora(r=2)")
    assert all(p.requires_grad for p in old.parameters()) and type(old[1]) is nn.Linear


def test_a_module_in_two_places_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.LayerNorm(8)
            self.linear = self.other = nn.Linear(8, 8)

        def forward(self, x):
            return self.other(self.second(self.linear(self.first(x))))

    for recipe in ("full", "lora(r=2)"):
        model, x = Twice(), torch.randn(3, 8)
        expected = model(x)
        tuner = efftune.apply(model, recipe)
        assert model.first is model.second and model.linear is model.other and isinstance(model.first, LayerNorm)
        assert isinstance(model.linear, Linear)
        torch.testing.assert_close(model(x), expected)
        tuner.remove()
        assert model.first is model.second and type(model.first) is nn.LayerNorm
