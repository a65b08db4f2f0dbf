"""Names of transformers that efftune relies on, asked for in the installed version. Most are looked at with getattr, so
if one were renamed, a feature would be gone without a word."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import efftune
from efftune.interop.transformers import attention, blocks, eager_attention, rotary
from efftune.interop.transformers.lm_head import lm_head_why_not
from efftune.linear.module import is_conv1d
from efftune.nn.subbatch import _is_cache

transformers = pytest.importorskip("transformers")
SIZES = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, pad_token_id=0
)


def llama(implementation="sdpa"):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attn_implementation=implementation))


def parameters(function):
    return inspect.signature(inspect.unwrap(function)).parameters


def test_what_is_imported_exists():
    names = set()
    for file in Path(efftune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
                names |= {(node.module, alias.name) for alias in node.names}
    assert names
    missing = [f"{module}.{name}" for module, name in names if not hasattr(importlib.import_module(module), name)]
    assert not missing


def test_caches():
    """A block's cache is told by its length, and by that or a state whether something is in it."""
    for kind in (transformers.DynamicCache, transformers.StaticCache, transformers.EncoderDecoderCache):
        assert issubclass(kind, transformers.Cache) and _is_cache(object.__new__(kind))
    assert "layer_idx" in parameters(transformers.Cache.get_seq_length)
    assert "layer_idx" in parameters(transformers.Cache.has_previous_state)
    layer = llama().model.layers[0]
    assert [name for name, p in parameters(type(layer).forward).items() if "Cache" in str(p.annotation)]
    assert layer.self_attn.layer_idx == 0
    assert layer.gradient_checkpointing is False  # the model's own, which ours switches off within


def test_the_attention_interface():
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    sdpa = attention._original or functions["sdpa"]
    assert set(attention.KNOWN) <= parameters(sdpa).keys()
    attention.register()
    assert set(attention._more) == parameters(attention._original).keys() - {*attention.KNOWN, "kwargs"}
    assert list(parameters(type(functions).get_interface)) == ["self", "attn_implementation", "default"]
    assert callable(functions.register)
    for implementation in ("sdpa", "eager"):
        module = llama(implementation).model.layers[0].self_attn
        assert module.config._attn_implementation == implementation
        assert (module.is_causal, module.num_key_value_groups) == (True, 1)
    assert callable(eager_attention.own_function(module))


def test_the_parts_of_a_block():
    model = llama()
    layer, embedding = model.model.layers[0], model.model.rotary_emb
    assert type(embedding).__name__.endswith("RotaryEmbedding")
    assert callable(vars(importlib.import_module(type(embedding).__module__))[rotary.FUNCTION])
    assert type(layer.input_layernorm).__name__.endswith("RMSNorm")
    assert isinstance(layer.input_layernorm.variance_epsilon, float)
    assert set(blocks.GATED) | {"act_fn"} == set(layer.mlp._modules)
    swapped = str(blocks.install(model))
    assert all(part in swapped for part in ("3 RMSNorm", "1 GatedMLP", "1 attention", "1 rotary"))


def test_the_model_and_its_head():
    model = llama()
    assert isinstance(model, transformers.PreTrainedModel)
    assert isinstance(getattr(model, model.base_model_prefix), nn.Module)
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert "logits_to_keep" in parameters(type(model).forward)
    assert lm_head_why_not(model) is None
    assert model.config.max_position_embeddings > 0 and model.config.pad_token_id == 0
    config = transformers.Gemma2Config(final_logit_softcapping=7.0)
    assert config.get_text_config().final_logit_softcapping == 7.0


def test_conv1d():
    model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    assert is_conv1d(model.h[0].mlp.c_fc) and model.h[0].mlp.c_fc.weight.shape == (16, 64)
