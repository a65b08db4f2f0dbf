"""Attention whose weights are kept once: values, gradients, dropout, bytes, codes, sampled rows; and on models."""

import copy
import weakref

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import efftune
from efftune import EfftuneError
from efftune.interop.transformers import eager_attention as routed
from efftune.linear import Exact
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled
from efftune.memory import meter
from efftune.nn import eager_attention as module
from efftune.nn.attention import KEEP
from efftune.nn.eager_attention import ROWS, eager_attention
from tests.budget import assert_within_budget
from tests.linear.test_keeps import bias_z
from tests.nn.families import DECODER, LAYERS, assert_same_when_checkpointed, batch, gradients, loss, model

B, H, HKV, T, D = 2, 4, 2, 16, 8


def inputs(dtype=torch.float32, heads=HKV, keys=T, tokens=T, rows=B):
    g = torch.Generator().manual_seed(0)
    shapes = ((rows, tokens, H, D), (rows, keys, heads, D), (rows, keys, heads, D))
    return tuple(torch.randn(s, generator=g).to(dtype).transpose(1, 2).requires_grad_() for s in shapes)


def causal(dtype=torch.float32, size=T):
    return torch.full((1, 1, size, size), torch.finfo(torch.float16).min, dtype=dtype).triu(1)


def composed(q, k, v, mask=None, scale=0.3, dropped=None):
    """As transformers writes it. dropped: what dropout multiplies the weights with."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).mT * scale
    scores = scores if mask is None else scores + mask
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=wide).to(q.dtype)
    weights = weights if dropped is None else weights * dropped
    return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), weights


def like(tensors, dtype):
    return tuple(t.detach().to(dtype).requires_grad_() for t in tensors)


def upstream(t):
    return torch.linspace(-1, 1, t.numel(), dtype=torch.float64).sin().view(t.shape).to(t.dtype)


def pulled(outputs, tensors):
    return torch.autograd.grad([t for t in outputs], tensors, [upstream(t) for t in outputs])


@pytest.mark.parametrize("weights", [False, True], ids=["out", "out and weights"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [H, HKV, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, heads, masked, weights):
    count = 2 if weights else 1
    own, single, double = ((t := like(inputs(dtype, heads), kind), composed(*t, causal(kind) if masked else None))
                           for kind in (dtype, torch.float32, torch.float64))  # fmt: skip
    tensors = inputs(dtype, heads)
    found = eager_attention(*tensors, causal(dtype) if masked else None, scale=0.3)
    assert found[0].is_contiguous()
    for a, b in zip(found, own[1], strict=True):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 4)
    found = pulled(found[:count], tensors)
    theirs, rough, exact = (pulled(outputs[:count], given) for given, outputs in (own, single, double))
    for a, b, c, e in zip(found, theirs, rough, exact, strict=True):
        if dtype == torch.float32:
            assert_within_budget(a, e, c)
        else:
            assert (a.double() - e).norm() <= 1.5 * (b.double() - e).norm()


def test_a_mask_of_another_dtype_and_the_weights_alone():
    q, k, v = inputs(torch.bfloat16, keys=9)
    mask = torch.randn(B, H, T, 9)
    found, expected = eager_attention(q, k, v, mask, scale=0.3), composed(q, k, v, mask)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
    a, b = (torch.autograd.grad(t[1].float().square().sum(), (q, k)) for t in (found, expected))
    for x, y in zip(a, b, strict=True):
        assert (x - y).norm() <= 0.02 * y.norm()


@pytest.mark.parametrize("rows", [Exact(), Sampled(1.0)], ids=str)
def test_dropout_has_the_same_mask_in_backward(rows):
    tensors = inputs()
    plain = eager_attention(*tensors, causal(), scale=0.3)[1].detach()
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        out = eager_attention(*tensors, causal(), scale=0.3, dropout=0.25, rows=rows)
        found.append((*(t.detach() for t in out), *pulled(out, tensors)))
    assert all(map(torch.equal, found[0], found[1])) and not torch.equal(found[0][1], found[2][1])
    share = (found[0][1] != 0)[plain > 0].double().mean()
    assert abs(share - 0.75) < 4 * (0.25 * 0.75 / (plain > 0).sum()) ** 0.5
    scaled = torch.where(found[0][1] == 0, 0.0, 1 / 0.75)
    double, single = like(tensors, torch.float64), like(tensors, torch.float32)
    exact, rough = composed(*double, causal(), dropped=scaled), composed(*single, causal(), dropped=scaled)
    exact, rough = (*exact, *pulled(exact, double)), (*rough, *pulled(rough, single))
    for a, e, r in zip(found[0], exact, rough, strict=True):
        assert_within_budget(a, e.detach(), r.detach())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_keeps(dtype, dropout):
    """q, k and v as they are and the weights, once; a seed, and no mask."""
    q, k, v = inputs(dtype)
    kept = meter.saved_for_backward(
        nn.Identity(), lambda: eager_attention(q, k, v, causal(dtype), dropout=dropout)[0].sum()
    )
    assert kept.total == dtype.itemsize * (B * T * D * (H + 2 * HKV) + B * H * T * T) + (8 if dropout else 0)
    codes = meter.saved_for_backward(nn.Identity(), lambda: eager_attention(q, k, v, keep=Quantized(8, 16))[0].sum())
    assert codes.total == (1 + 4 / 16) * (B * T * D * (H + 2 * HKV) + B * H * T * T) + 8


def test_nothing_outlives_the_graph():
    q, k, v = inputs()
    out, weights = eager_attention(q, k, v)
    left = weakref.ref(weights)
    storage = weakref.ref(weights.untyped_storage())
    del out, weights
    assert left() is None and storage() is None


def test_quantised_keeps():
    q, k, v = inputs()
    exact = torch.autograd.grad(eager_attention(q, k, v, causal())[0].square().sum(), (q, k, v))
    for bits, most in ((8, 0.02), (4, 0.35)):
        torch.manual_seed(0)
        out = eager_attention(q, k, v, causal(), keep=Quantized(bits, 8), dropout=0.0)[0]
        assert torch.equal(out, eager_attention(q, k, v, causal())[0])
        for found, t in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), exact, strict=True):
            assert 1e-4 * t.norm() < (found - t).norm() < most * t.norm()


# ---- Sampled rows


def drawn(rows, seed, tensors, dropout=0.0, keep=None):
    torch.manual_seed(seed)
    return pulled(eager_attention(*tensors, causal(), scale=1.0, dropout=dropout, rows=rows, keep=keep)[:1], tensors)


@pytest.mark.parametrize("sampler", ["systematic", "wta", "crs"])
def test_sampled_rows_are_unbiased_and_dq_is_exact(sampler):
    tensors, rows = inputs(), Sampled(0.3, sampler, min_rows=2)
    exact = drawn(Exact(), 0, tensors)
    draws = [drawn(rows, seed, tensors) for seed in range(1000)]
    assert all(torch.equal(draw[0], exact[0]) for draw in draws)
    for i in (1, 2):
        assert not torch.equal(draws[0][i], draws[1][i])
        assert bias_z([draw[i] for draw in draws], exact[i]) < 4.8  # over 512 entries: P = 0.1 %
    again = drawn(rows, 7, tensors)
    assert all(map(torch.equal, again, draws[7]))


def test_topk_is_biased():
    """The test above can fail."""
    tensors = inputs()
    exact, found = (drawn(rows, 0, tensors) for rows in (Exact(), Sampled(0.3, "topk", min_rows=2)))
    assert all((a - b).norm() > 0.02 * b.norm() for a, b in zip(found[1:], exact[1:], strict=True))


def test_all_rows_are_bitwise_exact():
    tensors = inputs(torch.bfloat16)
    for rows in (Sampled(1.0), Sampled(0.1, min_rows=H // HKV * T)):
        assert all(map(torch.equal, drawn(rows, 3, tensors), drawn(Exact(), 3, tensors)))


def test_rows_drawn_by_their_norms_have_less_variance_than_uniform_ones(monkeypatch):
    tensors, rows = inputs(), Sampled(0.3, min_rows=2)
    tensors = [*tensors[:2], (tensors[2] * 4).detach().requires_grad_()]
    exact = drawn(Exact(), 0, tensors)

    def errors():
        draws = [drawn(rows, seed, tensors) for seed in range(200)]
        return [sum(float((draw[i] - exact[i]).square().sum()) for draw in draws) for i in (1, 2)]

    known = errors()
    monkeypatch.setattr(module, "row_norms", lambda x: torch.ones(len(x)))
    assert all(a < 0.8 * b for a, b in zip(known, errors(), strict=True))


def test_samples_dropout_and_codes_draw_apart():
    tensors = inputs(rows=1)
    exact = [torch.stack(t).mean(0) for t in zip(*(drawn(Exact(), s, tensors, 0.2) for s in range(2000)), strict=True)]
    rows, keep = Sampled(0.5, min_rows=2), Quantized(8, 8)
    draws = [drawn(rows, seed, tensors, 0.2, keep) for seed in range(2000)]
    for i in (1, 2):  # the mean over masks is an estimate itself, hence √2; codes have a small bias of their own
        assert bias_z([draw[i] for draw in draws], exact[i]) < 2**0.5 * 5


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(mask=torch.zeros(1, 1, T, T, requires_grad=True)), "position bias"),
        (dict(mask=torch.ones(1, 1, T, T, dtype=torch.bool)), "not torch.bool"),
        (dict(heads=3), "takes q"),
        (dict(dtype=torch.float64), "not torch.float64"),
    ],
)
def test_refusals(change, sentence):
    q, k, v = inputs(change.get("dtype", torch.float32), heads=change.get("heads", HKV))
    with pytest.raises(ValueError, match=sentence):
        eager_attention(q, k, v, change.get("mask"))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(eager_attention(*(t := inputs()))[0].square().sum(), t[0], create_graph=True)


# ---- On models


def eager(family, **settings):
    return model(family, attention="eager", **settings)


def saved(made):
    return meter.saved_for_backward(made, lambda: loss(made, batch())).total


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bert"])
def test_a_second_model_is_untouched(family):
    other = eager(family, dropout=0.1 if family != "Llama" else 0.0)
    torch.manual_seed(0)
    size, (expected, own) = saved(other), gradients(other, batch())
    efftune.apply(eager(family), "full")
    torch.manual_seed(0)
    assert saved(other) == size
    value, found = gradients(other, batch())
    assert torch.equal(value, expected) and all(torch.equal(found[name], own[name]) for name in own)
    assert "eager" not in ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("where", ["attribute", "list", "buffer", "child"])
def test_a_function_that_writes_into_its_module_is_left_alone(where, monkeypatch):
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.eager_attention_forward
    kept = {"attribute": lambda m: m.seen, "list": lambda m: m.seen[0], "buffer": lambda m: int(m.count[0])}
    kept["child"] = lambda m: int(m.dropout.count[0])

    def noting(module, *args, **kwargs):
        if where == "attribute":
            module.seen = 1
        elif where == "list":
            module.seen[0] += 1
        else:
            (module if where == "buffer" else module.dropout).count += 1
        return plain(module, *args, **kwargs)

    made = eager("Llama")
    attention = made.model.layers[0].self_attn
    attention.seen, attention.dropout = [0] if where == "list" else 0, nn.Dropout(0.0)
    for m in (attention, attention.dropout):
        m.register_buffer("count", torch.zeros(1))
    assert attention in routed.modules(made)
    routed._known.pop(attention)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", noting)
    assert attention not in routed.modules(made) and kept[where](attention) == 0
    routed._known.clear()


def test_what_computes_something_else_is_left_alone():
    import transformers

    more = dict(num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * LAYERS)
    sinks = transformers.GptOssForCausalLM(transformers.GptOssConfig(**DECODER, **more, attn_implementation="eager"))
    assert len(routed.modules(sinks)) == 0
    capped = transformers.Gemma2Config(**DECODER, attn_logit_softcapping=2.0, attn_implementation="eager")
    biased = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    for kind, config in ((transformers.Gemma2ForCausalLM, capped), (transformers.T5EncoderModel, biased)):
        torch.manual_seed(0)
        made = kind(config).train()

        def total(made=made):
            inputs = batch()
            output = made(**inputs)
            return (output[0].tanh() * inputs["attention_mask"][..., None]).sum()

        results = []
        for _ in range(2):
            made.zero_grad()
            total().backward()
            results.append({name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None})
            results.append(meter.saved_for_backward(made, total).total)
            if len(results) == 2:  # attention alone, so that all else has the same bits
                routed.register()
                assert routed.modules(made)
                for each in routed.modules(made):
                    setattr(each, KEEP, Exact())
        assert results[1] == results[3]
        assert all(torch.equal(results[2][name], grad) for name, grad in results[0].items())


def test_attention_weights_come_out_and_have_gradients():
    plain, inputs = eager("Llama"), batch(padded=True)

    def both(made):
        output = made(**inputs, output_attentions=True)
        made.zero_grad()
        total = output.logits.tanh().sum() + sum(a.square().sum() for a in output.attentions)
        total.backward()
        return output.attentions, made.model.layers[0].self_attn.k_proj.weight.grad.clone()

    attentions, grad = both(plain)
    tuner = efftune.apply(plain, "full")
    found, got = both(tuner.model)
    for a, b in zip(found, attentions, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(got, grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family, recipe", [("GPT2", "full"), ("Bert", "full + wtacrs(ratio=0.3, attention=True)")])
def test_checkpointing_with_dropout_gives_the_same_bits(family, recipe, reentrant):
    if "wtacrs" in recipe and reentrant:
        pytest.skip("its forward runs without grad and draws no seeds for keeps")
    assert_same_when_checkpointed(lambda: eager(family, dropout=0.2), recipe, reentrant)


@pytest.mark.parametrize("recipe", ["full", "full + mesa(bits=4)", "full + wtacrs(ratio=0.3, attention=True)"])
def test_generation_and_evaluation_are_unchanged(recipe):
    plain = eager("Llama").eval()
    ids = batch()["input_ids"][:1, :5]
    options = dict(max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    expected, logits = plain.generate(ids, **options), plain(ids).logits
    tuner = efftune.apply(plain, recipe)
    assert torch.equal(tuner.model.eval().generate(ids, **options), expected)
    with torch.no_grad():
        torch.testing.assert_close(tuner.model(ids).logits, logits)


def test_autocast():
    plain, inputs = eager("Llama"), batch()

    def grads(made):
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(made, inputs)

    _, own = grads(plain)
    _, exact = gradients(plain, inputs)
    _, found = grads(efftune.apply(plain, "full").model)
    ours, theirs, true = (torch.cat([g[n].flatten() for n in exact]) for g in (found, own, exact))
    assert (ours - true).norm() <= 1.5 * (theirs - true).norm()


def test_a_compiled_model_keeps_what_the_compiler_decides():
    torch._dynamo.reset()
    tuner = efftune.apply(eager("Llama"), "full")
    expected = gradients(tuner.model, batch())[1]
    compiled = torch.compile(tuner.model, backend="aot_eager")
    loss(compiled, batch()).backward()
    for name, p in tuner.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-5)


# ---- wtacrs(attention=True)


def sampling(made):
    return [getattr(m, ROWS, None) for m in routed.modules(made)]


@pytest.mark.parametrize(
    "recipe, blocks",
    [("full + wtacrs(ratio=0.3, min_rows=4, attention=True)", True),
     ("full + wtacrs(ratio=0.3, min_rows=4, attention=True)", False),
     ("lora(r=4) + wtacrs(ratio=0.3, min_rows=4, attention=True) + mesa(bits=8)", True),
     ("lora(r=4) + mesa(bits=8, max_error=0.5) + wtacrs(ratio=0.3, min_rows=4, attention=True)", True)],
)  # fmt: skip
def test_a_recipe_samples_attention_and_stops(recipe, blocks):
    plain, inputs = eager("Llama"), batch()
    structure, logits = str(plain), plain(**inputs).logits
    tuner = efftune.apply(plain, recipe, blocks=blocks)
    for m in plain.modules():
        if hasattr(m, "lora_b"):
            nn.init.normal_(m.lora_b)
    assert sampling(plain) == [Sampled(0.3, min_rows=4)] * LAYERS
    if "mesa" in recipe:
        assert all(isinstance(getattr(m, KEEP), Quantized) for m in routed.modules(plain))
    tuner.backward(inputs, loss)
    name = "model.layers.0.self_attn.k_proj"
    name += ".lora_a" if "lora" in recipe else ".weight"
    parameter = plain.get_parameter(name)

    def grad(seed):
        torch.manual_seed(seed)
        parameter.grad = None
        loss(plain, inputs).backward()
        return parameter.grad.clone()

    assert torch.equal(grad(1), grad(1)) and not torch.equal(grad(1), grad(2))
    with tuner.exactly():
        exact = grad(1)
        assert torch.equal(exact, grad(2))
    assert sampling(plain) == [Sampled(0.3, min_rows=4)] * LAYERS
    mean = sum(grad(seed) for seed in range(60)) / 60
    assert (mean - exact).norm() < 0.4 * exact.norm()
    tuner.remove()
    assert sampling(plain) == [None] * LAYERS and str(plain) == structure
    assert not any(hasattr(m, KEEP) for m in plain.modules())
    assert torch.equal(plain(**inputs).logits, logits)


def test_a_recipe_that_samples_attention_needs_eager_attention():
    with pytest.raises(EfftuneError, match="runs none that is known; load it with attn_implementation"):
        efftune.apply(model("Llama"), "full + wtacrs(attention=True)")
    two = "wtacrs(target_modules='q_proj', attention=True) + wtacrs(ratio=0.5, target_modules='k_proj', attention=True)"
    with pytest.raises(EfftuneError, match="samples its query rows one way, not as Sampled.*leave one of the two out"):
        efftune.apply(eager("Llama"), f"full + {two}")
    tuner = efftune.apply(eager("Llama"), "full + wtacrs")
    assert sampling(tuner.model) == [None] * LAYERS
    copied = copy.deepcopy(efftune.apply(eager("Llama"), "full + wtacrs(attention=True)").model)
    assert sampling(copied) == [Sampled()] * LAYERS
