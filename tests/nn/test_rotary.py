"""Rotary embedding of Hugging Face's models: what it keeps, whom it serves, whom it leaves alone, and back."""

import copy
import importlib

import pytest
import torch
from torch import nn

import efftune
from efftune.interop.transformers import rotary as module
from efftune.interop.transformers.blocks import Blocks, _install_rotary
from efftune.interop.transformers.rotary import _computes, register
from efftune.memory import meter
from efftune.nn.rotary import rotary, rotary_pair
from tests.budget import assert_within_budget
from tests.nn.families import DECODER, DECODERS, LAYERS, batch, gradients, loss, model
from tests.ops.test_rotary import hf, operands
from tests.saved import saved_bytes


def modeling(family):
    return importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")


@pytest.fixture
def calls(monkeypatch):
    """Counts what goes through `rotary_pair`."""
    seen = []

    def counted(q, k, cos, sin):
        seen.extend([q.shape, k.shape])
        return rotary_pair(q, k, cos, sin)

    monkeypatch.setattr(module, "rotary_pair", counted)
    return seen


@pytest.mark.parametrize("table", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, table):
    x, cos, sin = operands((2, 4, 9, 16), dtype, table)
    upstream = torch.linspace(-1, 1, x.numel()).view(x.shape).to(dtype)

    def both(function, kind):
        leaf = x.detach().to(kind).requires_grad_()
        y = function(leaf, *(t.to(kind) if kind != dtype else t for t in (cos, sin)))
        return y.detach(), torch.autograd.grad(y, leaf, upstream.to(kind))[0]

    found = both(rotary, dtype)
    exact, single = (both(lambda *args: hf(args[0], *args)[0], kind) for kind in (torch.float64, torch.float32))
    for result, e, s in zip(found, exact, single, strict=True):
        assert_within_budget(result, e, s)


def test_cos_and_sin_are_all_that_is_kept():
    x, cos, sin = operands((2, 4, 9, 16), torch.bfloat16, shared=True)
    q, k = x.requires_grad_(), x[:, :2].detach().requires_grad_()

    def layers():
        return [rotary(t, cos, sin) for t in (q, k, q, k)]

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        rotary(q, cos, sin)
    assert kept == [cos.data_ptr(), sin.data_ptr()]
    assert saved_bytes(layers, nn.Module()) == cos.nbytes + sin.nbytes
    assert saved_bytes(lambda: rotary(x.detach(), cos, sin), nn.Module()) == 0


def test_a_pair_has_the_gradients_of_each():
    x, cos, sin = operands((2, 4, 9, 16), torch.float32)
    q, k = x.requires_grad_(), x[:, :2].detach().requires_grad_()
    alone = [torch.autograd.grad(rotary(t, cos, sin).square().sum(), t)[0] for t in (q, k)]

    def squares():
        return [y.square().sum() for y in rotary_pair(q, k, cos, sin)]

    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(sum(squares()), (q, k)), alone, strict=True))
    for i, t in enumerate((q, k)):  # the other's result is not used
        assert torch.equal(torch.autograd.grad(squares()[i], t)[0], alone[i])
    frozen = rotary_pair(q.detach(), k, cos, sin)[1]
    assert torch.equal(torch.autograd.grad(frozen.square().sum(), k)[0], alone[1])


def test_no_second_derivative():
    x, cos, sin = operands((1, 2, 3, 4), torch.float32)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(rotary(x, cos, sin).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("family", DECODERS)
def test_a_model_is_served_until_remove(family, calls):
    """In float32 with the bits of transformers. (Only torch's norm of q sums the gradient of its weight in the order of
    the memory, which is another.)"""
    plain = model(family)
    expected = gradients(plain, batch())
    done = Blocks()
    _install_rotary(plain, done)
    assert str(done) == "1 rotary"
    found = gradients(plain, batch())
    assert len(calls) == 2 * LAYERS and {shape[1] for shape in calls} == {4, 2}
    assert torch.equal(found[0], expected[0])
    for name, g in expected[1].items():
        assert torch.equal(found[1][name], g) or ("_norm" in name and torch.allclose(found[1][name], g, rtol=1e-5))
    done.remove()
    assert not any(m._forward_hooks for m in plain.modules())
    gradients(plain, batch())
    assert len(calls) == 2 * LAYERS


@pytest.mark.parametrize("family", DECODERS)
def test_other_models_have_their_own_bits(family, calls):
    other = model(family, torch.bfloat16)
    own = getattr(modeling(family), module.FUNCTION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling(family), module.FUNCTION, getattr(own, "__wrapped__", own))  # as it came
        expected = gradients(other, batch())
    tuner = efftune.apply(model(family, torch.bfloat16), "full")
    assert "1 rotary" in tuner.summary()
    gradients(tuner.model, batch())
    assert len(calls) == 2 * LAYERS
    found = gradients(other, batch())
    assert len(calls) == 2 * LAYERS and torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], g) for name, g in expected[1].items())
    tuner.remove()
    gradients(tuner.model, batch())
    assert len(calls) == 2 * LAYERS


def test_copies_and_second_recipes(calls):
    plain = model("Llama", torch.bfloat16)
    first = efftune.apply(plain, "full")
    twin = copy.deepcopy(plain)
    expected = gradients(plain, batch())
    second = efftune.apply(plain, "full + mesa(bits=8)")
    assert not second.blocks.rotary
    second.remove()
    first.remove()
    calls.clear()
    found = gradients(twin, batch())  # the copy goes on alone
    assert len(calls) == 2 * LAYERS and torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], g) for name, g in expected[1].items())


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "recompute"])
def test_what_runs_again_is_served_again(how, calls):
    results = []
    for again in (False, True):
        plain = model("Llama", torch.bfloat16)
        efftune.apply(plain, "full + recompute" if again and how == "recompute" else "full")
        if again and how != "recompute":
            plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how == "reentrant"})
            plain.enable_input_require_grads()
        calls.clear()
        results.append(gradients(plain, batch(padded=True)))
        assert len(calls) == (4 if again else 2) * LAYERS
    (a, first), (b, second) = results
    assert torch.equal(a, b) and all(torch.equal(first[name], second[name]) for name in first)


def test_float32_tables_of_a_16_bit_model(calls):
    """OLMo computes in float32 and goes on with q's dtype."""
    import transformers

    torch.manual_seed(0)
    plain = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**DECODER)).bfloat16().train()
    expected = loss(plain, batch())
    efftune.apply(plain, "full")
    torch.testing.assert_close(loss(plain, batch()), expected, rtol=0.02, atol=0.1)
    assert len(calls) == 2 * LAYERS


def test_a_part_of_the_samples_is_served(calls):
    tuner = efftune.apply(model("Llama", torch.bfloat16), "full")
    from efftune.nn.subbatch import install

    for block in tuner.model.model.layers:
        install(block, ratio=0.5)
    inputs = batch(rows=4)
    inputs["position_ids"] = torch.arange(14).expand(4, 14)  # cos and sin are cut, too
    gradients(tuner.model, inputs)
    assert {shape[0] for shape in calls} == {4, 2}


def test_under_autocast(calls):
    plain = model("Qwen2")
    results = []
    for tuned in (False, True):
        tuner = efftune.apply(plain, "full") if tuned else None
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(plain, batch()))
        assert len(calls) == (2 * LAYERS if tuned else 0)
    assert tuner is not None
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.02, atol=0.1)


def test_float64_and_the_compiler_have_the_original(calls):
    torch._dynamo.reset()
    plain = model("Llama").double()
    expected = gradients(plain, batch())[0]
    done = Blocks()
    _install_rotary(plain, done)
    assert torch.equal(gradients(plain, batch())[0], expected)
    plain.float()
    once = loss(plain, batch())
    assert calls
    calls.clear()
    torch.testing.assert_close(loss(torch.compile(plain, fullgraph=True, backend="aot_eager"), batch()), once)
    assert not calls

    def f(x, cos, sin):
        return rotary(x, cos, sin) + 1

    args = operands((1, 2, 3, 4), torch.float32)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(*args), f(*args))


def test_generation_with_a_cache_is_unchanged(calls):
    plain = model("Llama").eval()
    ids = batch()["input_ids"][:2, :5]
    options = dict(max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    expected = plain.generate(ids, **options)
    efftune.apply(plain, "full")
    assert torch.equal(plain.eval().generate(ids, **options), expected) and calls


@pytest.mark.parametrize("family", ["Cohere", "Glm", "Gemma3n", "Gpt_Oss"])
def test_files_that_compute_something_else_keep_their_function(family):
    file = modeling(family)
    own = getattr(file, module.FUNCTION)
    kind = next(v for v in vars(file).values() if isinstance(v, type) and v.__module__ == file.__name__)
    assert not register({kind}) and getattr(file, module.FUNCTION) is own


def test_recognised_by_what_it_computes():
    def interleaved(q, k, cos, sin, unsqueeze_dim=1):
        def rotate(x):
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin

    def back(q, k, cos, sin):
        return hf(q, k, cos, -sin)

    def part(q, k, cos, sin):
        return tuple(torch.cat([hf(t[..., :4], t, cos[..., :4], sin[..., :4])[0], t[..., 4:]], -1) for t in (q, k))

    def wide(q, k, cos, sin):
        return hf(q.float(), k.float(), cos, sin)

    def one(x, cos, sin):
        return hf(x, x, cos, sin)[0]

    def through_float32(q, k, cos, sin):
        return tuple(t.to(q.dtype) for t in hf(q.float(), k.float(), cos, sin))

    assert _computes(hf) and _computes(through_float32)
    mixed = torch.bfloat16, torch.float32
    assert _computes(through_float32, mixed) and not _computes(hf, mixed)
    assert not any(map(_computes, (interleaved, back, part, wide, one)))


def test_peak_memory_does_not_grow():
    """Nothing is written over q, and still no more is needed than for transformers' function: by itself, and in a step
    of a model of which nothing else is swapped."""
    x, cos, sin = operands((2, 8, 64, 32), torch.bfloat16)
    q, k = x.requires_grad_(), x[:, :2].detach().requires_grad_()
    dq, dk = torch.randn_like(q), torch.randn_like(k)

    def ours(q, k, cos, sin):
        return rotary(q, cos, sin), rotary(k, cos, sin)

    def peaks(function):
        forward = meter.allocated(lambda: function(q, k, cos, sin))[1]
        both = meter.allocated(lambda: torch.autograd.grad(function(q, k, cos, sin), (q, k), (dq, dk)))[1]
        return forward, both

    results = q.nbytes + k.nbytes
    forward, both = peaks(ours)
    assert forward <= 1.01 * results and both <= 2.01 * results
    assert all(a < b for a, b in zip((forward, both), peaks(hf), strict=True))

    steps = []
    for tuned in (False, True):
        plain = model("Llama", torch.bfloat16)
        if tuned:
            _install_rotary(plain, Blocks())
        steps.append(meter.allocated(lambda m=plain: loss(m, batch()).backward())[1])
    assert steps[1] <= steps[0]
