"""The block around the Linear: swapped on the instance, the same loss and gradients, fewer bytes, and back."""

import contextlib
import copy
import sys

import pytest
import torch
from torch import nn

import efftune
from efftune.interop.transformers.blocks import install, recognise
from efftune.linear import Exact, Linear
from efftune.linear.keep.quantized import Quantized
from efftune.memory import meter
from efftune.nn.glu import GatedMLP
from efftune.nn.norm import LayerNorm, RMSNorm
from tests.nn.families import FAMILIES, LAYERS, assert_same_when_checkpointed, batch, gradients, loss, model


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_as_near_to_float64_as_the_models_own(family, attention, dtype, padded):
    inputs = batch(padded)
    plain = model(family, dtype, attention=attention)
    double = copy.deepcopy(plain).double()
    double.set_attn_implementation("sdpa")  # eager attention has its softmax in float32 whatever the model's dtype
    oracle_loss, oracle = gradients(double, inputs)
    own_loss, own = gradients(plain, inputs)
    tuner = efftune.apply(plain, "full")
    assert tuner.blocks.swaps and len(tuner.blocks.attention) == LAYERS
    got_loss, got = gradients(tuner.model, inputs)
    assert got.keys() == own.keys() == oracle.keys()
    eps = torch.finfo(dtype).eps

    def within(ours, theirs, exact):
        error, yardstick = (ours.double() - exact).norm(), (theirs.double() - exact).norm()
        assert error <= 1.5 * yardstick + 4 * eps * exact.norm() / exact.numel() ** 0.5

    within(got_loss, own_loss, oracle_loss)
    # All together: a single small parameter's error may by chance be far below its own.
    within(*(torch.cat([g[n].double().flatten() for n in oracle]) for g in (got, own, oracle)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_remove_gives_the_model_back(family, attention):
    plain = model(family, attention=attention)
    structure, config = str(plain), copy.deepcopy(plain.config)
    modules = dict(plain.named_modules())
    state = {name: t.clone() for name, t in plain.state_dict().items()}
    expected = loss(plain, batch())
    tuner = efftune.apply(plain, "full")
    assert plain.state_dict().keys() == state.keys()
    assert tuner.remove() is plain and str(plain) == structure
    assert all(module is modules[name] for name, module in plain.named_modules())
    assert plain.config._attn_implementation == config._attn_implementation == attention
    assert not any(hasattr(m, "keep") for m in plain.modules())
    assert all(torch.equal(t, state[name]) for name, t in plain.state_dict().items())
    assert torch.equal(loss(plain, batch()), expected)


def test_remove_takes_adapters_out_and_merge_puts_them_in():
    for end, changed in (("remove", False), ("merge", True)):
        plain = model("Llama")
        structure, expected = str(plain), loss(plain, batch())
        tuner = efftune.apply(plain, "lora(r=4)")
        for layer in (m for m in plain.modules() if isinstance(m, Linear)):
            nn.init.normal_(layer.lora_b)
        getattr(tuner, end)()
        assert str(plain) == structure
        assert torch.equal(loss(plain, batch()), expected) != changed


def test_blocks_can_be_left_alone():
    tuner = efftune.apply(model("Llama"), "full", blocks=False)
    assert not any(isinstance(m, (RMSNorm, Linear)) or hasattr(m, "keep") for m in tuner.model.modules())


class Wrong(nn.Module):
    """Named like a norm, and another function."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * self.weight


class OddRMSNorm(Wrong):
    pass


def test_what_computes_something_else_is_left_alone():
    hooked = nn.LayerNorm(8)
    hooked.register_forward_hook(lambda *_: None)
    net = nn.Sequential(OddRMSNorm(), nn.LayerNorm(8), hooked, nn.RMSNorm(8, eps=1e-6), nn.Sigmoid(), nn.GELU("tanh"))
    done = install(net)
    assert [type(m).__name__ for m in net] == [
        "OddRMSNorm", "LayerNorm", "LayerNorm", "RMSNorm", "Sigmoid", "Activation",
    ]  # fmt: skip
    assert isinstance(net[1], LayerNorm) and net[2] is hooked and isinstance(net[3], RMSNorm)
    assert len(done.swaps) == 3
    assert recognise(nn.SiLU()) == "silu" and recognise(nn.GELU()) == "gelu" and recognise(nn.Mish()) is None


@pytest.mark.parametrize(
    "recipe, reentrant",
    [
        ("full", False), ("full", True), ("lora(r=4, lora_dropout=0.2)", False), ("lora(r=4, lora_dropout=0.2)", True),
        # Not with reentrant checkpointing: its forward runs without grad and draws no seeds for keeps.
        ("full + mesa(bits=8)", False),
    ],
)  # fmt: skip
def test_checkpointing_gives_the_same_bits(recipe, reentrant):
    assert_same_when_checkpointed(lambda: model("Llama"), recipe, reentrant)


def test_a_lost_source_costs_memory_and_nothing_else():
    torch.manual_seed(0)
    norm = RMSNorm(nn.Parameter(torch.rand(16)))
    linear = Linear.from_linear(nn.Linear(16, 8, bias=False))
    x = torch.randn(5, 16, requires_grad=True)
    results = []
    for lose in (False, True):
        with meter.saved(nn.ModuleList([norm, linear])) as kept:
            y = norm(x)
            out = linear(y.view(1, 5, 16).view(5, 16).clone() if lose else y)
        results.append((kept.total, *torch.autograd.grad(out.square().sum(), (x, norm.weight, linear.weight))))
    assert results[1][0] - results[0][0] == 5 * 16 * 4
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def test_a_source_is_found_through_a_view_and_not_through_a_part():
    norm = RMSNorm(nn.Parameter(torch.rand(16)))
    linear = Linear.from_linear(nn.Linear(16, 8, bias=False))
    for view, found in ((lambda y: y.view(6, 16), True), (lambda y: y[:1].reshape(3, 16), False)):
        x = torch.randn(2, 3, 16, requires_grad=True)
        with meter.saved(nn.ModuleList([norm, linear])) as kept:
            y = norm(x)
            out = linear(view(y))
        assert (kept.total < 2 * x.nbytes) == found
        expected = torch.autograd.grad(out.sum(), linear.weight, retain_graph=True)[0]
        torch.testing.assert_close(expected, view(y).sum(0).expand(8, 16))


def test_several_backward_passes_through_one_graph():
    tuner = efftune.apply(model("Llama"), "full")
    value = loss(tuner.model, batch())
    value.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in tuner.model.named_parameters()}
    tuner.model.zero_grad()
    value.backward()
    assert all(torch.equal(p.grad, once[n]) for n, p in tuner.model.named_parameters())


def test_a_change_in_place_between_forward_and_backward_is_noticed():
    norm, linear = RMSNorm(nn.Parameter(torch.rand(16))), Linear.from_linear(nn.Linear(16, 8))
    x = torch.randn(5, 16)
    out = linear(norm(x))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_dropout_in_attention_is_left_to_torch():
    tuner = efftune.apply(model("Bert", dropout=0.2), "full")
    torch.manual_seed(0)
    value, found = gradients(tuner.model, batch())
    plain = model("Bert", dropout=0.2)
    torch.manual_seed(0)
    expected, own = gradients(plain, batch())
    torch.testing.assert_close(value, expected)
    for name in own:
        torch.testing.assert_close(found[name], own[name], rtol=1e-3, atol=1e-5)


def test_generation_and_evaluation_are_unchanged():
    plain = model("Llama").eval()
    ids = batch()["input_ids"][:1, :5]
    options = dict(max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    expected = plain.generate(ids, **options)
    tuner = efftune.apply(plain, "full + mesa(bits=4)")
    assert torch.equal(tuner.model.eval().generate(ids, **options), expected)


def test_keeps_of_a_block_are_one():
    with pytest.raises(efftune.EfftuneError, match="one way"):
        efftune.apply(model("Llama"), "full + mesa(bits=4) + mesa(bits=8)")
    tuner = efftune.apply(model("Llama"), "full + mesa(bits=4, group=32)")
    keeps = {str(m.keep) for m in tuner.model.modules() if hasattr(m, "keep")}
    # the head is no block
    assert keeps == {str(Quantized(4, 32))} and Exact() not in keeps


def test_clipped_activations_are_no_others():
    from transformers.activations import ACT2FN

    assert recognise(ACT2FN["gelu_10"]) is None and recognise(nn.Hardtanh(0, 20)) is None
    assert recognise(ACT2FN["gelu_new"]) == "gelu_tanh" and recognise(ACT2FN["relu2"]) == "relu2"
    state = torch.get_rng_state()
    install(nn.Sequential(nn.Dropout(0.5), nn.RReLU()))
    assert torch.equal(state, torch.get_rng_state())


def test_a_second_recipe_changes_the_keeps_of_the_blocks():
    plain = model("Llama")
    structure = str(plain)
    first = efftune.apply(plain, "full")
    second = efftune.apply(plain, "full + mesa(bits=4)")
    assert {str(m.keep) for m in plain.modules() if hasattr(m, "keep")} == {str(Quantized(4))}
    second.remove()
    first.remove()
    assert str(plain) == structure and plain.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("recipe", ["full + wtacrs", "vcas", "lora(r=4)"])
def test_a_tuner_without_its_recipe_says_so_and_drives_nothing(recipe):
    tuner = efftune.apply(model("Llama"), recipe)
    optimizer = tuner.optimizer(lr=1e-3)
    tuner.remove()
    optimizer.step()
    tuner.summary()
    tuner.remove()
    with pytest.raises(efftune.EfftuneError, match="taken out"):
        tuner.backward(batch(), loss)


def test_a_rebuilt_tensor_goes_with_the_backward_that_made_it():
    """Also where not every layer that read it has a backward."""
    norm = RMSNorm(nn.Parameter(torch.rand(16)))
    layers = [Linear.from_linear(nn.Linear(16, 8)) for _ in range(3)]
    y = norm(torch.randn(5, 16, requires_grad=True))
    once = y._efftune_source.handle.once
    outputs = [layer(y) for layer in layers]
    value = outputs[0].sum() + outputs[1].sum()
    value.backward()
    assert once.users == 3 and once.value is None and value.grad_fn is not None


def test_a_frozen_trunk_keeps_nothing():
    """Handles are free only where backward holds their tensors anyway."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).requires_grad_(False)
    x = torch.randn(200, 32)
    kept = {}
    for blocks in (False, True):
        tuned = efftune.apply(copy.deepcopy(net), "lora(r=2, target_modules='2') + wtacrs(ratio=0.1)", blocks=blocks)
        kept[blocks] = meter.saved_for_backward(tuned.model, lambda t=tuned: t.model(x).sum()).total
    assert kept[True] <= kept[False]


def test_other_shapes_other_dtypes_and_in_place_changes():
    norm, linear = RMSNorm(nn.Parameter(torch.rand(8))), Linear.from_linear(nn.Linear(16, 4))
    x = torch.randn(6, 8, requires_grad=True)
    linear(norm(x).view(3, 16)).sum().backward()  # rows of another width
    torch.testing.assert_close(linear.weight.grad[0], norm(x).view(3, 16).sum(0))
    h = linear(torch.randn(2, 3, 16))
    h += 1  # as after any layer of torch
    h.sum().backward()
    assert norm(x.detach().bfloat16()).dtype == torch.float32  # a float32 weight promotes, as in transformers
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)


def test_a_model_that_looks_at_its_config_sees_sdpa():
    """Falcon adds its mask in another way unless the config says sdpa."""
    import transformers

    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, use_cache=False,
        new_decoder_architecture=True, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    falcon = transformers.FalconForCausalLM(config).train()
    inputs = batch()
    expected = gradients(falcon, inputs)[1]
    tuner = efftune.apply(falcon, "full")
    assert tuner.blocks.swaps
    found = gradients(falcon, inputs)[1]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_a_class_that_computes_something_else_since_is_asked_again(monkeypatch):
    """Also what layers read one tensor, which is remembered for blocks of the same code."""
    from transformers.models.llama import modeling_llama as llama

    def gated(tuner):
        return sum(isinstance(new, GatedMLP) for *_, new in tuner.blocks.swaps)

    def groups(tuner):
        tuner.model(**batch())
        hooks = [hook.__self__ for m in tuner.model.modules() for hook in m._forward_pre_hooks.values()]
        return [names for hook in hooks for names in hook.names]

    def crossed(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    def apart(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x.abs()))

    attention, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    for forward, is_gated, found in (
        (llama.LlamaMLP.forward, True, [attention, mlp]),
        (crossed, False, [attention, mlp[::-1]]),
        (apart, False, [attention]),
    ):
        monkeypatch.setattr(llama.LlamaMLP, "forward", forward)
        tuner = efftune.apply(model("Llama"), "lora(r=4)")
        assert gated(tuner) == LAYERS * is_gated and groups(tuner) == found * LAYERS


def size(x):
    return x.pow(2).mean(-1, keepdim=True)


SETTINGS = {"times": 1.0}


class HelpedRMSNorm(nn.Module):
    """Computes with a method, a static one, functions beside it, a constant of the class and one of the file."""

    times = 1.0

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def root(self, x):
        return torch.rsqrt(x + self.eps)

    @staticmethod
    def scaled(x, weight):
        return x * weight

    def forward(self, x):
        return self.scaled(x * self.root(deep(x)), self.weight) * self.times * SETTINGS["times"]


def deep(x):
    return size(x)


def other_size(x):
    return x.abs().mean(-1, keepdim=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(HelpedRMSNorm, "root", lambda self, x: torch.rsqrt(x + 1)),
        lambda patch: patch.setattr(HelpedRMSNorm, "scaled", staticmethod(lambda x, weight: x * (2 + weight))),
        lambda patch: patch.setattr(sys.modules[__name__], "size", other_size),
        lambda patch: patch.setattr(size, "__code__", other_size.__code__),
        lambda patch: patch.setattr(HelpedRMSNorm, "times", 2.0),
        lambda patch: patch.setitem(SETTINGS, "times", 2.0),
        lambda patch: patch.setattr(torch, "rsqrt", torch.sqrt),
    ],
)
def test_what_a_module_computes_is_asked_of_each_model(change, monkeypatch, recognised_anew):
    """Code, constants, settings and helpers may be others than at the last model's."""
    swaps = [len(install(nn.Sequential(HelpedRMSNorm())).swaps)]
    change(monkeypatch)
    swaps.append(len(install(nn.Sequential(HelpedRMSNorm())).swaps))
    monkeypatch.undo()
    assert swaps == [1, 0]


class Settings:
    """What a caller may have set when it applies a recipe."""

    half = staticmethod(lambda: default_dtype(torch.float16))
    double = staticmethod(lambda: default_dtype(torch.float64))
    meta = staticmethod(lambda: torch.device("meta"))
    narrow = staticmethod(lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t))
    none = staticmethod(lambda: torch.no_grad())


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("around", [name for name in vars(Settings) if not name.startswith("_")])
def test_blocks_are_recognised_whatever_the_caller_has_set(around, recognised_anew):
    expected = str(efftune.apply(model("Llama"), "lora(r=4)").blocks)
    plain = model("Llama")
    with getattr(Settings, around)():
        tuner = efftune.apply(plain, "lora(r=4)")
    assert str(tuner.blocks) == expected
    loss(tuner.model, batch()).backward()


def test_inference_mode_is_refused_before_the_model_is_touched():
    plain = model("Llama")
    with torch.inference_mode(), pytest.raises(efftune.EfftuneError, match="apply the recipe outside"):
        efftune.apply(plain, "lora(r=4)")
    assert all(p.requires_grad for p in plain.parameters())
    assert not any(isinstance(m, Linear) for m in plain.modules())


def test_a_rotary_embedding_that_computes_something_else_since(monkeypatch):
    from transformers.models.llama import modeling_llama as file

    expected = str(efftune.apply(model("Llama"), "full").blocks)
    assert "rotary" in expected
    monkeypatch.setattr(file, "rotate_half", lambda x: x.flip(-1))
    plain = model("Llama")
    own = gradients(copy.deepcopy(plain), batch())[1]
    tuner = efftune.apply(plain, "full")
    assert "rotary" not in str(tuner.blocks)
    found = gradients(tuner.model, batch())[1]
    for name, gradient in own.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
    monkeypatch.undo()
    assert str(efftune.apply(model("Llama"), "full").blocks) == expected
