"""What trains beside adapters, against the real PEFT: biases, modules that are saved whole, weights of two names."""

import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.interop import peft as files
from tests.interop.both_ways import agree, gpt2, randomize
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
