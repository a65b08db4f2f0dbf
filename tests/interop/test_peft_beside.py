"""What trains beside adapters, against the real PEFT: biases, modules that are saved whole, weights of two names."""

import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.interop import peft as files
from tests.interop.both_ways import agree, assert_both_ways, bert, gpt2, randomize, roberta
from tests.methods.models import batch, llama

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_both_ways(bias, tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Linear(5, 5))

    x = torch.randn(3, 6)
    tuner = efftune.apply(network(), f"lora(r=2, target_modules=['0', '2'], bias='{bias}')")
    randomize(tuner.model)
    tuner.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path / "ours")
    torch.testing.assert_close(theirs(x), tuner.model(x), rtol=1e-5, atol=1e-5)
    theirs = peft.get_peft_model(network(), peft.LoraConfig(r=2, target_modules=["0", "2"], bias=bias))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(efftune.load(network(), tmp_path / "theirs").model(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [lambda: llama(tie=True), gpt2])
@pytest.mark.parametrize("module", ["embedding", "lm_head"])
def test_a_weight_of_two_modules(model, module, tmp_path):
    name = module if module == "lm_head" else "wte" if model is gpt2 else "embed_tokens"
    tuner = efftune.apply(model(), f"lora(r=4, modules_to_save=['{name}'])")
    randomize(tuner.model)
    tuner.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path)
    agree(tuner.model, theirs)
    (tmp_path / "efftune_config.json").unlink()
    again = efftune.load(model(), tmp_path)
    agree(again.model, theirs)
    with torch.no_grad():  # as PEFT trains them: two copies
        theirs.get_output_embeddings().weight.add_(1)
    theirs.save_pretrained(tmp_path / "untied")
    with pytest.raises(EfftuneError, match="two different tensors for .*weight, one for each of its names"):
        efftune.load(model(), tmp_path / "untied")


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )


def test_a_module_in_several_places(tmp_path):
    """T5's embedding is that of the model, of the encoder and of the decoder."""

    def output(model):
        with torch.no_grad():
            return model.eval()(input_ids=batch(seed=5), decoder_input_ids=batch(seed=6)).logits

    tuner = efftune.apply(t5(), "lora(r=4, target_modules='q|v', modules_to_save=['shared'])")
    randomize(tuner.model)
    tuner.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(t5(), tmp_path / "ours")
    torch.testing.assert_close(output(theirs), output(tuner.model), rtol=1e-5, atol=1e-5)
    assert torch.equal(output(efftune.load(t5(), tmp_path / "ours").model), output(tuner.model))
    config = peft.LoraConfig(r=4, target_modules=["q", "v"], modules_to_save=["shared"])
    peft.get_peft_model(t5(), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(EfftuneError, match="shared whole, a copy in PEFT of what"):
        efftune.load(t5(), tmp_path / "theirs")


@pytest.mark.parametrize("ensure", [False, True])
def test_one_of_two_modules_that_share_a_weight(ensure, tmp_path):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=ensure,
    )
    theirs = peft.get_peft_model(llama(tie=True), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    if ensure:
        agree(efftune.load(llama(tie=True), tmp_path).model, theirs)
    else:
        with pytest.raises(EfftuneError, match="a copy in PEFT of what lm_head.weight is tied to in this model"):
            efftune.load(llama(tie=True), tmp_path)


def test_a_setting_that_ties_nothing_is_not_believed(tmp_path):
    """PEFT does not tie GPT-2's head to the copy of its embedding, whatever the setting says."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=64))

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=True,
        fan_in_fan_out=True,
    )  # fmt: skip
    theirs = peft.get_peft_model(gpt2(), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(EfftuneError, match="a copy in PEFT of what lm_head.weight is tied to in this model"):
        efftune.load(gpt2(), tmp_path)


def test_running_statistics_of_a_module_that_is_saved_whole(tmp_path):
    def network():
        torch.manual_seed(0)
        middle = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))
        return nn.Sequential(OrderedDict(first=nn.Linear(6, 8), middle=middle, last=nn.Linear(8, 5)))

    x = torch.randn(16, 6) + 2
    tuner = efftune.apply(network(), "lora(r=2, target_modules='first|last', modules_to_save=['middle'])")
    randomize(tuner.model)
    tuner.model(x)
    tuner.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path / "ours", is_trainable=True)
    torch.testing.assert_close(theirs.eval()(x), tuner.model.eval()(x), rtol=1e-5, atol=1e-5)
    theirs.train()(x + 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = efftune.load(network(), tmp_path / "theirs").model
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_classification_head_is_trained_and_saved(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    def bert():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        return BertForSequenceClassification(config)

    ids = torch.randint(0, 50, (2, 7))
    tuner = efftune.apply(bert(), "lora(r=2, target_modules='query|value')")
    assert "classifier.weight" in tuner.named_trained()
    randomize(tuner.model)
    tuner.save(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(ids).logits, tuner.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    theirs = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = efftune.load(bert(), tmp_path / "theirs").model.eval()
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_nested_classification_head(tmp_path):
    from tests.methods.test_apply import classifier

    ids = torch.randint(2, 50, (2, 7))
    tuner = efftune.apply(classifier("Roberta"), "lora(r=2, target_modules='query|value')")
    randomize(tuner.model)
    tuner.save(tmp_path)
    assert json.loads((tmp_path / files.CONFIG).read_text())["modules_to_save"] == ["classifier"]
    theirs = peft.PeftModel.from_pretrained(classifier("Roberta"), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, tuner.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:PEFT has no place")
def test_a_module_that_pefts_endings_cannot_name_alone(tmp_path):
    """ "pre_classifier" ends like "classifier", and has an adapter of its own."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    def model():
        torch.manual_seed(0)
        return DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=1, n_heads=2)
        )

    tuner = efftune.apply(model(), "lora(r=4)")
    randomize(tuner.model)
    tuner.save(tmp_path)
    assert json.loads((tmp_path / files.CONFIG).read_text())["modules_to_save"] is None
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path)
    with torch.no_grad():
        theirs.base_model.model.classifier.load_state_dict(tuner.model.classifier.state_dict())
    agree(tuner.model, theirs)
    agree(efftune.load(model(), tmp_path).model, tuner.model)


def seq_llama():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    return LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=0, attention_bias=True))


SELF = ["query", "value"]
WHOLE = [
    (bert, dict(task_type="SEQ_CLS", target_modules=SELF)),
    (bert, dict(task_type="SEQ_CLS", target_modules="all-linear")),
    (bert, dict(target_modules=SELF, modules_to_save=["classifier", "pooler", "word_embeddings", "LayerNorm"])),
    (bert, dict(target_modules=["dense"], modules_to_save=["attention"])),
    (bert, dict(target_modules=["classifier"], modules_to_save=["pooler"])),
    (roberta, dict(task_type="SEQ_CLS", target_modules=SELF)),  # whose head has layers in it
    (roberta, dict(target_modules=SELF, modules_to_save=["out_proj"])),
    (seq_llama, dict(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    (gpt2, dict(target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)),
]


@pytest.mark.parametrize("bias", ["all", "lora_only", "none"])
@pytest.mark.parametrize("make, config", WHOLE, ids=lambda value: getattr(value, "__name__", str(value)))
def test_biases_and_modules_that_are_saved_whole(make, config, bias, tmp_path):
    """With bias="all" the file has the biases of such a module under three names, one of which nobody uses."""
    keys = assert_both_ways(peft, make, peft.LoraConfig(r=2, bias=bias, **config), tmp_path)
    twice = any(".modules_to_save." in key for key in keys)
    assert twice == any(".original_module." in key for key in keys) == (bias == "all" and make is not seq_llama)


@pytest.mark.parametrize("name", ["other", "bias"])
def test_an_adapter_of_another_name(name, tmp_path):
    """Which is in the keys of the biases of a head with layers in it."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=SELF, bias="all")
    theirs = peft.get_peft_model(roberta(), config, adapter_name=name)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    if name == "bias":  # PEFT takes such a name out of every key, and reads its own file no more
        with pytest.raises(EfftuneError, match="does not fit RobertaForSequenceClassification"):
            efftune.load(roberta(), tmp_path / name)
    else:
        agree(efftune.load(roberta(), tmp_path / name).model, theirs)


def test_a_bias_of_a_copy_that_is_no_copy_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=SELF, bias="all")
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path)
    file = tmp_path / files.WEIGHTS
    tensors, key = load_file(file), files.PREFIX + "classifier.modules_to_save.bias"
    save_file(tensors | {key: tensors[key] + 1}, file)
    with pytest.raises(EfftuneError, match="two different tensors for classifier.bias"):
        efftune.load(bert(), tmp_path)
    save_file(tensors | {files.PREFIX + "pooler.original_module.bias": tensors[key].clone()}, file)
    with pytest.raises(EfftuneError, match="does not fit .* .first at .*pooler.original_module.bias"):
        efftune.load(bert(), tmp_path)


@pytest.mark.parametrize("kind", [dict(), dict(use_dora=True)], ids=str)
@pytest.mark.parametrize("bias", ["all", "lora_only", "none"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"], ".*(lm_head|up_proj)"], ids=str)
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_an_adapter_on_the_head(targets, tie, bias, kind, tmp_path):
    """Beside which PEFT writes the head's own weight, which it shares with an embedding or does not."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, bias=bias, **kind)
    keys = assert_both_ways(peft, lambda: llama(tie=tie), config, tmp_path)
    assert files.PREFIX + "lm_head.base_layer.weight" in keys
    tuner = efftune.load(llama(tie=tie), tmp_path / "theirs")
    assert torch.equal(tuner.model.model.embed_tokens.weight, llama(tie=tie).model.embed_tokens.weight)


@pytest.mark.parametrize(
    "make, config",
    [
        (lambda: bert("ForMaskedLM"), dict(target_modules=["decoder", "query"])),
        (gpt2, dict(target_modules=["lm_head", "c_attn"], fan_in_fan_out=True)),
        (llama, dict(target_modules=["lm_head"], modules_to_save=["embed_tokens"])),
    ],
    ids=["bert", "gpt2", "llama"],
)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings", "ignore:fan_in_fan_out")
def test_an_adapter_on_other_heads(make, config, bias, tmp_path):
    assert_both_ways(peft, make, peft.LoraConfig(r=2, bias=bias, **config), tmp_path)


def test_hira_on_the_head(tmp_path):
    assert_both_ways(peft, llama, peft.HiraConfig(r=2, target_modules=["lm_head", "q_proj"]), tmp_path)


@pytest.mark.parametrize("saved, here", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_own_weight_of_a_head_in_another_dtype(saved, here, tmp_path):
    made = {name: llama(dtype=torch.bfloat16).to(getattr(torch, name)) for name in (saved, here)}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
    peft.get_peft_model(made[saved], config).save_pretrained(tmp_path)
    assert efftune.load(made[here], tmp_path).recipe.startswith("lora(r=2")
    with pytest.raises(
        EfftuneError, match="first at lm_head.weight.: nothing was loaded, since .* the model has another"
    ):
        efftune.load(llama(seed=1), tmp_path)


def test_embeddings_that_were_saved_as_they_were(tmp_path):
    """PEFT does so where a vocabulary has grown, or where it is told to."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    theirs = peft.get_peft_model(llama(), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_keys(tmp_path))
    agree(efftune.load(llama(), tmp_path).model, theirs)
    larger = llama()
    larger.resize_token_embeddings(100)
    with pytest.raises(EfftuneError, match="embed_tokens.weight|lm_head.weight.*merge it with PEFT"):
        efftune.load(larger, tmp_path)


def load_keys(folder):
    from safetensors.torch import load_file

    return set(load_file(folder / files.WEIGHTS))


@pytest.mark.parametrize("bias", ["all", "lora_only", "none"])
def test_ours_with_biases_and_modules_in_peft(bias, tmp_path):
    recipe = (
        f"lora(r=2, target_modules='query|value', bias='{bias}', modules_to_save=['classifier', 'pooler', 'LayerNorm'])"
    )
    tuner = efftune.apply(bert(), recipe)
    randomize(tuner.model)
    tuner.save(tmp_path)
    config = json.loads((tmp_path / files.CONFIG).read_text())
    assert config["bias"] == bias and config["modules_to_save"] is not None
    agree(peft.PeftModel.from_pretrained(bert(), tmp_path), tuner.model)
    (tmp_path / "efftune_config.json").unlink()
    agree(efftune.load(bert(), tmp_path).model, tuner.model)
