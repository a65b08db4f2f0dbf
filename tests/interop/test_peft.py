"""Against the real PEFT: our adapter in PEFT gives our logits, and PEFT's adapter here gives PEFT's."""

import json

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.interop import peft as files
from tests.interop.both_ways import agree, gpt2, randomize
from tests.interop.toys import register
from tests.methods.models import batch, llama, logits, loss_fn

peft = pytest.importorskip("peft")


RECIPES = [
    "lora(r=4)",
    "lora(r=4, lora_alpha=16.0, use_rslora=True, target_modules='q_proj|v_proj')",
    "lora(r=4, target_modules=['model.layers.0.mlp.up_proj', 'model.layers.2.self_attn.q_proj'])",
    "lora(r=2, target_modules='q_proj') + lora(r=6, lora_alpha=3.0, target_modules='v_proj|up_proj')",
    "lora(r=4, freeze_a=True, lora_dropout=0.1)",
    "lora(r=4, modules_to_save=['lm_head'])",
    "lora(r=4) + full(target_modules='norm')",
    "lora(r=4, target_modules='q_proj', use_rslora=True) + lora(r=3, target_modules='v_proj')",
    "lora(r=4, target_modules='q_proj') + lora(r=3, lora_alpha=7.0, use_rslora=True, target_modules='v_proj')",
    "lora(r=4, modules_to_save=['embed_tokens', 'layers.2'], target_modules='layers.0.*proj')",
]


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
    dict(r=4, target_modules=["q_proj"], modules_to_save=["head", "mlp"]),  # PEFT's endings, also within a name
    dict(
        r=4,
        lora_alpha=3,
        target_modules=["q_proj", "k_proj", "up_proj"],
        use_rslora=True,
        rank_pattern={".*q_proj": 2, "layers.2.mlp.up_proj": 5},
        alpha_pattern={"up_proj": 5, "layers.[01].self_attn.k_proj": 9},
    ),
    dict(r=4, target_modules=["q_proj", "up_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
    dict(r=4, target_modules=["q_proj"], layers_to_transform=[0, 2]),
    dict(r=4, target_modules=["q_proj"], layers_to_transform=0),
    dict(r=4, target_modules="all-linear", init_lora_weights="orthogonal"),
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


@pytest.mark.parametrize(
    "recipe", ["lora(r=4)", "lora(r=4, bias='all')", "lora(r=4, bias='lora_only', target_modules='c_attn')"]
)
def test_conv1d_both_ways(recipe, tmp_path):
    tuner = efftune.apply(gpt2(), recipe)
    randomize(tuner.model)
    tuner.save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / files.CONFIG).read_text())["fan_in_fan_out"] is True
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
    agree(tuner.model, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    agree(efftune.load(gpt2(), tmp_path / "theirs").model, theirs)


def test_over_weights_of_another_storage(tmp_path):
    """PEFT gives the same over the weights as int8 has them."""
    tuner = efftune.apply(llama(), "int8 + lora(r=4)")
    randomize(tuner.model)
    tuner.save(tmp_path)
    rounded = efftune.apply(llama(), "int8 + lora(r=1)").remove()
    agree(tuner.model, peft.PeftModel.from_pretrained(rounded, tmp_path))
    agree(efftune.load(llama(), tmp_path).model, tuner.model)


def test_a_layer_in_several_places_is_left_out(tmp_path):
    """PEFT puts an adapter in one of them."""

    def network():
        torch.manual_seed(0)
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 6))

    tuner = efftune.apply(network(), "lora(r=2)")
    randomize(tuner.model)
    with pytest.warns(UserWarning, match="PEFT has no place for 0.lora_a, 0.lora_b"):
        tuner.save(tmp_path / "ours")
    x = torch.randn(3, 6)
    torch.testing.assert_close(efftune.load(network(), tmp_path / "ours").model(x), tuner.model(x))
    theirs = peft.get_peft_model(network(), peft.LoraConfig(r=2, target_modules=["0", "3"]))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(EfftuneError, match="does not fit Sequential .first at 0"):
        efftune.load(network(), tmp_path / "theirs")


KINDS = [
    ("hira(r=4)", lambda **k: peft.HiraConfig(r=4, **k)),
    ("dora(r=4, lora_alpha=8.0)", lambda **k: peft.LoraConfig(r=4, use_dora=True, **k)),
    ("dora(r=2, use_rslora=True, target_modules='q_proj') + dora(r=5, target_modules='up_proj')",
     lambda **k: peft.LoraConfig(r=4, use_dora=True, lora_alpha=3, use_rslora=True, alpha_pattern={"q_proj": 2}, **k)),
    ("hadamard(r=4)", lambda **k: peft.HiraConfig(r=4, **k)),
    ("hadamard(r=2, target_modules='q_proj') + hadamard(r=2, target_modules='up_proj')",
     lambda **k: peft.HiraConfig(r=2, rank_pattern={"q_proj": 5}, **k)),  # which PEFT 0.21 reads nowhere
    ("magnitude(r=4, lora_alpha=8.0)", lambda **k: peft.LoraConfig(r=4, use_dora=True, **k)),
    ("magnitude(r=2, use_rslora=True, target_modules='q_proj') + magnitude(r=5, target_modules='up_proj')",
     lambda **k: peft.LoraConfig(r=4, use_dora=True, lora_alpha=3, use_rslora=True, alpha_pattern={"q_proj": 2}, **k)),
]  # fmt: skip


@pytest.mark.parametrize("recipe, config", KINDS, ids=[recipe for recipe, _ in KINDS])
@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_kind_is_an_entry_of_the_table(recipe, config, model, tmp_path, monkeypatch):
    register(monkeypatch)
    if model is gpt2:
        recipe = recipe.replace("q_proj", "c_attn").replace("up_proj", "c_fc")
    tuner = efftune.apply(model(), recipe)
    randomize(tuner.model)
    tuner.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path / "ours")
    agree(tuner.model, theirs)
    agree(efftune.load(model(), tmp_path / "ours").model, theirs)
    theirs = peft.get_peft_model(model(), config(target_modules=["q_proj"] if model is llama else ["c_attn", "c_fc"]))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    agree(efftune.load(model(), tmp_path / "theirs").model, theirs)


def test_a_subclass_of_a_kind_is_none_of_it(tmp_path, monkeypatch):
    """What it adds has no key in the file of a plain LoRA."""
    register(monkeypatch, carried=False)
    efftune.apply(llama(), "magnitude(r=2)").save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"trained.safetensors", "efftune_config.json"}


# Settings of PEFT that change nothing of what a file means, or go without saying.
HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "modules_to_save", "fan_in_fan_out", "bias", "ensure_weight_tying", "layers_pattern",
    "megatron_core", "qalora_group_size", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # of how an adapter begins
}  # fmt: skip


@pytest.mark.parametrize("kind", files.KINDS, ids=lambda kind: kind.delta.__name__)
def test_every_setting_of_pefts_is_read_or_refused_or_harmless(kind):
    from dataclasses import fields

    config = {"LORA": peft.LoraConfig, "HIRA": peft.HiraConfig}[kind.peft_type]
    theirs = {field.name: field.default for field in fields(config)}
    theirs.pop("rank_pattern" if kind.peft_type == "HIRA" else "", None)  # PEFT 0.21 does not look at it
    known = {*kind.patterns.values(), *kind.settings, kind.begins[0], *files.FOREIGN, *files.FEWER, *HARMLESS}
    assert theirs.keys() - known == {name for name, _ in kind.fields.values()}
    assert {name: theirs[name] for name, _ in kind.fields.values()} == dict(kind.fields.values())


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


def test_the_layers_are_those_of_the_keys(tmp_path):
    tuner = efftune.apply(llama(), "lora(r=4, target_modules='q_proj')")
    randomize(tuner.model)
    tuner.save(tmp_path)
    (tmp_path / "efftune_config.json").unlink()
    config = json.loads((tmp_path / files.CONFIG).read_text())
    for targets in (None, ".*q_proj", "(([a-z._0-9])+)+!"):  # the last would take for ever to be matched
        (tmp_path / files.CONFIG).write_text(json.dumps(config | {"target_modules": targets}))
        agree(efftune.load(llama(), tmp_path).model, tuner.model)


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
