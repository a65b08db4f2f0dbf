"""Against the real PEFT: our adapter in PEFT gives our logits, and PEFT's adapter here gives PEFT's."""

import json

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.interop import peft as files
from tests.methods.models import batch, llama, loss_fn

peft = pytest.importorskip("peft")

RECIPES = [
    "lora(r=4)",
    "lora(r=4, lora_alpha=16.0, use_rslora=True, target_modules='q_proj|v_proj')",
    "lora(r=4, target_modules=['model.layers.0.mlp.up_proj', 'model.layers.2.self_attn.q_proj'])",
    "lora(r=2, target_modules='q_proj') + lora(r=6, lora_alpha=3.0, target_modules='v_proj|up_proj')",
    "lora(r=4, freeze_a=True, lora_dropout=0.1)",
    "lora(r=4, modules_to_save=['lm_head'])",
    "lora(r=4) + full(target_modules='norm')",
]


def randomize(model):
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch(seed=5)).logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_our_adapter_in_peft(recipe, tmp_path):
    tuner = efftune.apply(llama(), recipe)
    randomize(tuner.model)
    tuner.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(tuner.model), rtol=1e-5, atol=1e-5)
    assert (logits(theirs) - logits(llama())).norm() > 0.1


CONFIGS = [
    dict(r=4, target_modules="all-linear"),
    dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    dict(r=4, lora_alpha=8, target_modules=r".*\.(up|down)_proj", lora_dropout=0.1),
    dict(
        r=4,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 7},
        alpha_pattern={"layers.1.mlp.up_proj": 5},
    ),
    dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_peft_adapter_here_and_back(config, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    tuner = efftune.load(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(tuner.model), logits(theirs), rtol=1e-5, atol=1e-5)
    tuner.save(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-5, atol=1e-5)


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


def test_layers_whose_names_end_alike(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))

    x = torch.randn(3, 6)
    tuner = efftune.apply(network(), "lora(r=2, target_modules='^0') + lora(r=3, target_modules='^1.0')")
    randomize(tuner.model)
    tuner.save(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(network(), tmp_path)(x), tuner.model(x))
    (tmp_path / "efftune_config.json").unlink()
    torch.testing.assert_close(efftune.load(network(), tmp_path).model(x), tuner.model(x))


def test_the_written_layout(tmp_path):
    from safetensors import safe_open

    tuner = efftune.apply(llama(), "lora(r=4, target_modules='q_proj')")
    tuner.save(tmp_path)
    text = (tmp_path / files.CONFIG).read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["target_modules"] == ["q_proj"] and config["r"] == 4 and config["lora_alpha"] == 4
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True and config["modules_to_save"] is None
    with safe_open(tmp_path / files.WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        assert file.get_slice(key).get_shape() == [4, 32]
        assert set(k.rpartition("lora_")[2] for k in file.keys()) == {"A.weight", "B.weight"}


def test_merge_gives_a_plain_hugging_face_checkpoint(tmp_path):
    from transformers import LlamaForCausalLM

    tuner = efftune.apply(llama(), "int8 + lora(r=4)")
    randomize(tuner.model)
    expected = logits(tuner.model)
    tuner.merge().save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(peft_type="IA3"), "IA3 adapter; only LORA"),
        (dict(use_dora=True), "uses use_dora"),
        (dict(init_lora_weights="pissa"), "begun by 'pissa'"),
        (dict(r=3), "does not fit"),
        (dict(target_modules=["k_proj"]), "does not fit"),
        (dict(target_modules=["nothing"]), "matches no linear layer"),
    ],
)
def test_adapters_that_cannot_be_read_are_refused(change, message, tmp_path):
    efftune.apply(llama(), "lora(r=4, target_modules='q_proj')").save(tmp_path)
    (tmp_path / "efftune_config.json").unlink()
    config = json.loads((tmp_path / files.CONFIG).read_text()) | change
    (tmp_path / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(EfftuneError, match=message):
        efftune.load(llama(), tmp_path)


def test_damaged_missing_and_pickled_files_are_refused(tmp_path):
    tuner = efftune.apply(llama(), "lora(r=4)")
    tuner.save(tmp_path)
    weights = tmp_path / files.WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(EfftuneError, match="damaged"):
        efftune.load(llama(), tmp_path)
    weights.unlink()
    with pytest.raises(EfftuneError, match="There is no"):
        efftune.load(llama(), tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(EfftuneError, match="is a pickle"):
        efftune.load(llama(), tmp_path)
    torch.save({}, weights)
    with pytest.raises(EfftuneError, match="is a pickle"):
        efftune.load(llama(), tmp_path)
    (tmp_path / "efftune_config.json").write_text("{}")
    with pytest.raises(EfftuneError, match="has no 'recipe'"):
        efftune.load(llama(), tmp_path)
    (tmp_path / "efftune_config.json").write_text("{")
    with pytest.raises(EfftuneError, match="is not JSON"):
        efftune.load(llama(), tmp_path)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_zeroth_order_over_pefts_prefixes(kind):
    model = peft.get_peft_model(llama(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    tuner = efftune.apply(model, "full(target_modules='prompt_encoder') + mezo(eps=1e-2)")
    assert list(tuner.named_trained()) == ["prompt_encoder.default.embedding.weight"]
    optimizer, losses = tuner.optimizer(lr=5.0), []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(float(tuner.backward(batch(), loss_fn)))
        optimizer.step()
    assert sum(losses[-5:]) < sum(losses[:5])
