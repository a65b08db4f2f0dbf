"""What `apply` refuses, and what it does with ties, hooks, heads, and modules that are used in other ways."""

import copy
import pickle

import pytest
import torch

import efftune
from efftune import EfftuneError
from efftune.linear import Linear
from tests.methods.models import batch, llama, logits, loss_fn, prepared, train

REFUSED = {
    "int8": "stores integers",
    "int8 + full": "stores integers",
    "full + int8": "stores integers",
    "full + lora(r=4)": "already trained as full",
    "lora(r=4) + full": "already trained as LoRA",
    "lora(r=4) + lora(r=8)": "already trained as LoRA",
    "lift(rank=4) + ltsft": "already trained as Entries(density=0.05) by lift, so that ltsft cannot",
    "shira(seed=1) + shira(seed=2)": "by shira, so that shira cannot train it",
    "mezo + mezo": "mezo and mezo each bring their own backward",
    "int8 + mezo": "stores integers",
    "lora(r=4, target_modules='nothing')": "no linear layer of LlamaForCausalLM; its linear layers end in: down_proj",
    "int8(target_modules=['nowhere']) + lora": "matches no linear layer",
    "full(target_modules='nowhere')": "matches no module",
    "lora(r=4, modules_to_save=['nowhere'])": "modules_to_save names 'nowhere'",
    "lora(r=33)": "model.layers.0.self_attn.q_proj: r=33 exceeds",
    "lora(r=0)": "rank of at least 1",
    "lora(r=-1)": "rank of at least 1",
    "lora(bias='some')": "'none', 'lora_only' or 'all'",
    "lisa(layers=9)": "only 3 layers",
    "lisa(layers=0)": "at least 1",
    "mezo(eps=0.0)": "eps > 0",
    "mezo(dist='uniform')": "'normal' or 'rademacher'",
    "mezo(points=3)": "1 or 2 points",
    "mezo(momentum=1.0)": "momentum lies in",
    "mezo(update='master')": "'stochastic' or 'exact' or 'log'",
    "mezo(per_layer='rms')": "'none' or 'variance' or 'expectation'",
    "sparsemezo(sparsity=1.0)": "sparsity lies in",
    "sparsemezo(sparsity=0.0)": "between 0 and 1",
    "fedkseed(k=0)": "at least 1",
    "fedkseed(unbiased=True)": "belongs to pro=True",
    "ferret(local_steps=0)": "at least 1 local step",
    "ferret(k=0)": "1 to 64 numbers for a block of 64",
    "ferret(k=65)": "1 to 64 numbers for a block of 64",
    "ferret(dist='uniform')": "'normal' or 'rademacher'",
    "ferret(scale=0.0)": "above 0",
    "ferret + mezo": "by mezo or by ferret, not both; leave one of them out",
    "sparsemezo + lora(r=4) + ferret": "by sparsemezo or by ferret",
    "ferret + ferret(k=2)": "by ferret or by ferret",
    "int8(group=0) + lora": "at least 1 weight",
    "full(target_modules='embed_tokens') + vcas": "finds nothing that trains in model.layers",
    "lora(r=4, lora_dropout=0.1) + vcas": "use lora_dropout=0.0",
    "full + vcas + recompute": "the blocks run again in backward already",
    "full + wtacrs + vcas": "samples its rows already, by another method than vcas",
    "full + vcas + wtacrs": "samples its rows already, by another method than vcas",
    "wtacrs + lora(r=4) + wtacrs(ratio=0.5)": "samples its rows already .*; leave out one",
    "mesa + full + mesa(bits=4)": "one way, not as Quantized() by mesa and as Quantized(bits=4) by mesa",
    "lisa(layers=1) + lisa(layers=2)": "lisa stands 2 times in the recipe",
    "dft + full + dft": "dft stands 2 times in the recipe",
    "peqa": "q_proj: the scales of integer weights train, and Dense() has none; add int8 to the recipe",
    "int8 + int8(group=32) + lora": "q_proj: int8 wants Int8() and int8 Int8(group=32)",
    "vcas + mezo": "vcas and mezo each bring their own backward",
    "vcas(sample_ratio=0.5)": "for fixed ones add interval=0",
    "vcas(interval=0, sample_ratio=0.0)": "in (0, 1]",
    "vcas(batches=1)": "batches >= 2",
}


@pytest.mark.parametrize("recipe", REFUSED)
def test_refusals_name_the_reason_and_leave_the_model_as_it_was(recipe):
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = repr(model), {n: (t, p.requires_grad) for n, p in model.named_parameters() for t in [p]}
    with pytest.raises(EfftuneError, match=r"(?s)" + REFUSED[recipe].replace("(", r"\(").replace(")", r"\)")):
        efftune.apply(model, recipe)
    after = repr(model), {n: (t, p.requires_grad) for n, p in model.named_parameters() for t in [p]}
    assert before[0] == after[0]
    assert all(before[1][n][0] is after[1][n][0] and before[1][n][1] == after[1][n][1] for n in before[1])


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(EfftuneError, match="Embedding has no linear layer for lora"):
        efftune.apply(torch.nn.Embedding(4, 4), "lora(r=4)")


def test_tied_weights_are_kept_tied_or_refused():
    model = llama(tie=True)
    tuner = efftune.apply(model, "lora(r=4, target_modules='lm_head')")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(EfftuneError, match="lm_head shares its weight"):
        tuner.merge()
    with pytest.raises(EfftuneError, match="lm_head shares its weight with model.embed_tokens.weight"):
        efftune.apply(llama(tie=True), "int8(target_modules='lm_head') + lora(r=4)")
    tuner = efftune.apply(llama(tie=True), "full")
    assert "lm_head.weight" not in tuner.named_trained() and "model.embed_tokens.weight" in tuner.named_trained()
    model = efftune.apply(llama(tie=True), "mezo").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("recipe", ["full", "lora(r=4)", "int8 + lora(r=4, lora_dropout=0.1)"])
def test_gradient_checkpointing_of_a_model_gives_the_same_gradients(recipe):
    gradients = []
    for checkpointing in (False, True):
        tuner = prepared(llama(), recipe)
        tuner.model.train()
        if checkpointing:
            tuner.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        tuner.backward(batch(), loss_fn)
        gradients.append([p.grad for p in tuner.named_trained().values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_deepcopy_of_a_tuned_model():
    tuner = prepared(llama(), "int8 + lora(r=4)")
    assert torch.equal(logits(copy.deepcopy(tuner.model)), logits(tuner.model))


@pytest.mark.parametrize("recipe", ["full", "int8 + lora(r=4)", "mezo(momentum=0.9)", "full + vcas", "ferret"])
def test_the_optimizer_of_a_copied_tuner_drives_the_copy_as_the_original_would_go_on(recipe):
    tuner = prepared(llama(), recipe)
    optimizer = tuner.optimizer(lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # binds a `step` to the original
    train(tuner, optimizer, 1, batch())
    copied, own = copy.deepcopy((tuner, optimizer))
    assert copied.run.optimizer is own is not optimizer
    before = {name: p.detach().clone() for name, p in tuner.model.named_parameters()}
    for one, other in ((copied, own), (tuner, optimizer)):
        torch.manual_seed(9)
        train(one, other, 2, batch())
        assert (copied.step, tuner.step) == ((3, 1) if one is copied else (3, 3))
        if one is copied:
            assert all(torch.equal(p, before[name]) for name, p in tuner.model.named_parameters())
    after = dict(tuner.model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in copied.model.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in after.items())


def test_a_copied_tuner_whose_optimizer_works_in_backward_is_refused():
    from efftune.optim.contract import Optimizer

    class InBackward(Optimizer):
        in_backward = True

    tuner = prepared(llama(), "full")
    tuner.attach(InBackward(tuner.named_trained().values(), {}))
    with pytest.raises(EfftuneError, match="InBackward would have no hooks in backward; copy the tuner before"):
        copy.deepcopy(tuner)


def test_bfloat16_model():
    for recipe in ("lora(r=4)", "int8 + lora(r=4)", "mezo", "lisa(layers=1)"):
        tuner = efftune.apply(llama(dtype=torch.bfloat16), recipe)
        losses = train(tuner, tuner.optimizer(lr=1e-3), 3, batch())
        assert all(torch.isfinite(torch.tensor(losses)))


def test_dense_weights_are_freed_while_a_model_is_quantised(monkeypatch):
    """At no time are more than one layer's dense weight and the integers so far held beside the rest of the model."""
    import weakref

    from efftune.linear.base import int8

    model = llama()
    weights = [weakref.ref(m.weight) for n, m in model.named_modules() if n.endswith("_proj")]
    alive = []
    quantize = int8.int8_quantize

    def counting(weight, group):
        if not weight.is_meta:
            alive.append(sum(w() is not None for w in weights))
        return quantize(weight, group)

    monkeypatch.setattr(int8, "int8_quantize", counting)
    efftune.apply(model, "int8 + lora(r=4)")
    assert alive == list(range(len(weights), 0, -1))


def test_a_layer_under_two_names_stays_one_layer():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(6, 6)
            self.b = torch.nn.ModuleDict({"again": self.a})

        def forward(self, x):
            return self.b["again"](self.a(x))

    model = Twice()
    tuner = efftune.apply(model, "lora(r=2)")
    assert isinstance(model.a, Linear) and model.b["again"] is model.a
    torch.nn.init.normal_(model.a.lora_b)
    x = torch.randn(3, 6)
    expected = model(x)
    torch.testing.assert_close(tuner.merge()(x), expected)
    assert type(model.a) is torch.nn.Linear and model.b["again"] is model.a


def test_one_clock():
    tuner = prepared(llama(), "lora(r=4) + lisa(layers=1, interval=1)")
    tuner.seek(3)  # before there is an optimizer
    first, second = tuner.optimizer(lr=0.1), tuner.optimizer(lr=0.1)
    first.step()
    assert tuner.step == 3
    second.step()
    assert tuner.step == 4


def classifier(kind):
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=1)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def test_a_new_classification_head_trains_whole_over_any_base():
    tuner = efftune.apply(classifier("Bert"), "int8(group=8) + lora(r=2)")
    assert type(tuner.model.classifier) is torch.nn.Linear and "classifier.weight" in tuner.named_trained()
    with pytest.raises(EfftuneError, match="classifier: full trains the stored weight itself"):
        efftune.apply(classifier("Bert"), "int8(group=8, target_modules='classifier|query') + lora(r=2)")


@pytest.mark.parametrize(
    "recipe",
    [
        "lora(r=4, target_modules='lm_head') + full(target_modules='embed_tokens')",
        "lora(r=4, target_modules='lm_head', modules_to_save=['embed_tokens'])",
        "full(target_modules='embed_tokens') + lora(r=4, target_modules='lm_head')",
    ],
)
def test_a_tied_weight_that_trains_elsewhere_is_refused(recipe):
    with pytest.raises(EfftuneError, match="tied to it trains|already trained as full"):
        efftune.apply(llama(tie=True), recipe)
    with pytest.raises(EfftuneError, match="shares its weight"):
        efftune.apply(llama(tie=True), "lora(r=4, target_modules='lm_head') + int8(target_modules='lm_head')")


def test_a_weight_unfrozen_by_hand_is_refused():
    model = efftune.apply(llama(), "lora(r=4)").model
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="does not train the weight"):
        loss_fn(model, batch())


def test_a_weight_that_is_not_finite_is_refused_by_name():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(EfftuneError, match=r"model.layers.1.mlp.up_proj: int8_quantize takes finite weights"):
        efftune.apply(model, "int8 + lora(r=4)")


def test_layers_whose_weight_is_read_without_a_call_are_left_alone():
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(EfftuneError, match="has no linear layer"):
        efftune.apply(encoder, "lora(r=2)")
    model = torch.nn.Sequential(encoder, torch.nn.Linear(8, 8))
    assert list(efftune.apply(model, "lora(r=2)").named_trained()) == ["1.lora_a", "1.lora_b"]


def test_a_layer_alone_and_a_layer_with_hooks_are_refused():
    with pytest.raises(EfftuneError, match="use efftune.Linear.from_linear"):
        efftune.apply(torch.nn.Linear(4, 4), "lora(r=2)")
    model = llama()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(EfftuneError, match="q_proj: it has hooks"):
        efftune.apply(model, "lora(r=2)")


def test_models_that_cannot_be_copied_deeply_are_tuned():
    import threading

    model = llama()
    model.lock = threading.Lock()
    model.cached = model.lm_head.weight * 2  # not a leaf
    assert efftune.apply(model, "lora(r=2)").named_trained()


def test_running_statistics_are_saved_and_loaded(tmp_path):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2))

    tuner = efftune.apply(network(), "full")
    x = torch.randn(32, 4) + 3
    tuner.backward(x, lambda m, x: m(x).square().mean())
    tuner.save(tmp_path)
    again = efftune.load(network(), tmp_path)
    assert torch.equal(again.model.eval()(x), tuner.model.eval()(x))


@pytest.mark.parametrize("recipe", ["lora(r=4)", "full + lisa(layers=1, interval=1)"])
def test_a_pickled_tuner_goes_on_where_it_was(recipe):
    results = []
    for pickled in (False, True):
        tuner = efftune.apply(llama(), recipe)
        optimizer = tuner.optimizer(lr=1e-3)
        train(tuner, optimizer, 2, batch())
        if pickled:
            tuner = pickle.loads(pickle.dumps(tuner))
            optimizer = tuner.run.optimizer
        train(tuner, optimizer, 3, batch())
        assert tuner.step == 5
        results.append(tuner.named_trained())
    assert all(torch.equal(p, results[1][name]) for name, p in results[0].items())


def test_a_plain_model_is_not_saved_as_a_tuned_one(tmp_path):
    for end in ("merge", "remove"):
        tuner = efftune.apply(llama(), "lora(r=4)")
        getattr(tuner, end)()
        with pytest.raises(EfftuneError, match="taken out .*: save the model itself"):
            tuner.save(tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


def test_a_model_with_adapters_of_pefts_is_refused():
    import peft

    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(EfftuneError, match="q_proj .* is a layer of PEFT's with an adapter; load the adapter by"):
        efftune.apply(model, "lora(r=4)")
    efftune.apply(model.merge_and_unload(), "lora(r=4)")
