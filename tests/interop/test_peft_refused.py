"""Files in the place of a PEFT adapter that cannot be read: each is refused in one sentence."""

import json

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.interop import peft as files
from tests.interop.both_ways import bert, roberta
from tests.methods.models import llama


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(peft_type="IA3"), "IA3 adapter; only LORA"),
        (dict(use_dora=True), "does not fit LlamaForCausalLM .first at .*lora_magnitude_vector"),
        (dict(use_qalora=True), "uses use_qalora"),
        (dict(init_lora_weights="pissa"), "begun by 'pissa'"),
        (dict(r=3), "does not fit"),
        (dict(target_modules=["k_proj"]), "does not fit"),
        (dict(target_modules=["nothing"]), "matches no linear layer"),
        (dict(target_modules=["q_proj", "v_proj"]), "does not fit LlamaForCausalLM .first at model.layers.0.*v_proj"),
        (dict(target_modules=[3]), "target_modules=.3., which is no list of names"),
        (dict(target_modules="(([a-z._0-9])+)+!", lora_alpha=None), "lora_alpha=None, where PEFT has 8"),
        (dict(r="4"), "r='4', where PEFT has 8"),
        (dict(use_rslora=None), "use_rslora=None, where PEFT has False"),
        (dict(rank_pattern=[3]), "has a rank_pattern that is none"),
        (dict(alpha_pattern={"(": 3}), "has a alpha_pattern that is none"),
        (dict(alpha_pattern={"q_proj": "3"}), "lora_alpha='3', where PEFT has 8"),
        (dict(modules_to_save="lm_head"), "modules_to_save='lm_head', which is no list of names"),
        (dict(modules_to_save=["lm_head"]), "does not fit LlamaForCausalLM .first at lm_head.weight"),
    ],
)
def test_adapters_that_cannot_be_read_are_refused(change, message, tmp_path):
    efftune.apply(llama(), "lora(r=4, target_modules='q_proj')").save(tmp_path)
    (tmp_path / "efftune_config.json").unlink()
    config = json.loads((tmp_path / files.CONFIG).read_text()) | change
    (tmp_path / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(EfftuneError, match=message):
        efftune.load(llama(), tmp_path)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    "key", ["model.embed_tokens.weight", "model.norm.bias", "model.layers.0.self_attn.q_proj.weight"]
)
def test_tensors_that_nothing_asks_for_are_refused(key, ours, tmp_path):
    from safetensors.torch import load_file, save_file

    efftune.apply(llama(), "lora(r=4, target_modules='q_proj')").save(tmp_path)
    if not ours:
        (tmp_path / "efftune_config.json").unlink()
    file, model = tmp_path / files.WEIGHTS, llama()
    shape = dict(model.named_parameters()).get(key, model.model.norm.weight).shape
    save_file(load_file(file) | {files.PREFIX + key: torch.zeros(shape)}, file)
    with pytest.raises(EfftuneError, match=f"does not fit LlamaForCausalLM .first at .*{key}.: nothing was loaded"):
        efftune.load(model, tmp_path)
    assert model.model.embed_tokens.weight.any()


def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path):
    import os

    for file in (files.WEIGHTS, files.CONFIG, "efftune_config.json"):
        efftune.apply(llama(), "lora(r=4)").save(tmp_path)
        (tmp_path / file).unlink()
        os.mkfifo(tmp_path / file)
        if file == files.CONFIG:
            (tmp_path / "efftune_config.json").unlink()
        with pytest.raises(EfftuneError, match=f"{file} is no regular file"):
            efftune.load(llama(), tmp_path)
        (tmp_path / file).unlink()


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


def tied():
    return llama(tie=True)


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(16, 5))


def attention():
    torch.manual_seed(0)
    return nn.ModuleDict({"mix": nn.MultiheadAttention(8, 2), "last": nn.Linear(8, 8)})


@pytest.mark.parametrize(
    "make, kind, config, name",
    [
        (llama, "Lora", dict(target_modules=["embed_tokens"]), "model.embed_tokens, and this Embedding"),
        (llama, "Lora", dict(target_modules=["embed_tokens", "q_proj"]), "model.embed_tokens, and this Embedding"),
        (llama, "Lora", dict(target_modules=["embed_tokens", "lm_head"]), "model.embed_tokens, and this Embedding"),
        (llama, "Lora", dict(target_modules=".*(embed_tokens|q_proj)"), "model.embed_tokens, and this Embedding"),
        (llama, "Hira", dict(target_modules=["embed_tokens", "q_proj"]), "model.embed_tokens, and this Embedding"),
        (tied, "Lora", dict(target_modules=["lm_head"], ensure_weight_tying=True), "model.embed_tokens, and this Emb"),
        (bert, "Lora", dict(target_modules=["query", "word_embeddings"]), "bert.embeddings.word_embeddings"),
        (convolution, "Lora", dict(target_modules=["0", "2"]), "0, and this Conv1d"),
        (attention, "Lora", dict(target_modules=["mix", "last"]), "mix, and this MultiheadAttention"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_what_is_no_linear_layer_is_refused_by_its_name(make, kind, config, name, tmp_path):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(make(), getattr(peft, f"{kind}Config")(r=2, **config)).save_pretrained(tmp_path)
    model = make()
    before, modules = {n: p.clone() for n, p in model.named_parameters()}, list(model.modules())
    with pytest.raises(EfftuneError, match=f"has an adapter on {name}.*; merge it with PEFT .merge_and_unload."):
        efftune.load(model, tmp_path)
    assert list(model.modules()) == modules and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_module_that_is_saved_within_another_is_refused(bias, tmp_path):
    """PEFT's own file, and it reads it no more."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["out_proj", "classifier"], bias=bias)
    peft.get_peft_model(roberta(), config).save_pretrained(tmp_path)
    with pytest.raises(EfftuneError, match="saves classifier whole and classifier.out_proj in it once more"):
        efftune.load(roberta(), tmp_path)
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(roberta(), tmp_path)
