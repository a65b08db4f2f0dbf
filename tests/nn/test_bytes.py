"""What backward keeps of a Llama block, in units of d bytes per token and layer: counted by saved-tensor hooks around
the whole model, and by allocation, so that nothing hides. The difference of two depths leaves out what is around the
blocks. The sizes have a larger model's ratios (heads of 64, an MLP of 2.75 d, a rank of d / 64), and a small d: what is
kept per token whatever d is weighs more.
"""

import copy
import functools

import pytest
import torch

import efftune
from efftune.memory import meter

ROWS, TOKENS = 2, 128
WIDTHS = [256, pytest.param(1024, marks=pytest.mark.slow)]  # of 1024 are the figures in README.md


@functools.cache  # drawing the weights takes longer than all that is counted
def llama(d, layers, attention, dropout):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=d, intermediate_size=d * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=d // 64, num_key_value_heads=d // 256, max_position_embeddings=512, use_cache=False,
        dtype=torch.bfloat16, attention_dropout=dropout,
    )  # fmt: skip
    made = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return made.train()


def per_token_and_layer(d, recipe, padded=False, attention="sdpa", dropout=0.0):
    counted, allocated = [], []
    for layers in (1, 2):
        model = copy.deepcopy(llama(d, layers, attention, dropout))
        if recipe:
            efftune.apply(model, recipe)
        ids = torch.randint(0, 128, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        if padded:
            mask[0, -20:] = 0

        def forward(model=model, ids=ids, mask=mask):
            return model(input_ids=ids, attention_mask=mask).logits.float().sum()

        counted.append(meter.saved_for_backward(model, forward).total)
        allocated.append(meter.allocated(forward)[0])
    unit = ROWS * TOKENS * d
    return (counted[1] - counted[0]) / unit, (allocated[1] - allocated[0]) / unit


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(
    "recipe, padded, most",
    [
        ("full", False, 20.2),
        ("full", True, 20.3),
        ("lora(r={r})", False, 20.5),
        ("lora(r={r}, lora_dropout=0.1)", False, 20.5),
        ("full + mesa(bits=8)", False, 10.8),
        ("full + mesa(bits=4)", False, 5.9),
        ("full + wtacrs(ratio=0.3)", False, 20.2),
        ("lora(r={r}) + wtacrs(ratio=0.3) + mesa(bits=4)", False, 6.0),
    ],
)
def test_bytes_of_a_block(recipe, padded, most, d):
    recipe = recipe.format(r=d // 64)
    counted, allocated = per_token_and_layer(d, recipe, padded)
    print(f"{recipe}: {counted:.3f} d counted, {allocated:.3f} d allocated")
    assert counted <= most and allocated <= most


# With d / 64 · 128 = 2 d attention weights for each token, in 16 bits 4 d.
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(
    "recipe, dropout, most",
    [
        ("full", 0.0, 24.1),
        ("full", 0.1, 24.1),
        ("lora(r={r})", 0.0, 24.3),
        ("full + mesa(bits=8)", 0.0, 12.9),
        ("full + mesa(bits=4)", 0.0, 6.9),
        ("lora(r={r}) + wtacrs(ratio=0.3, attention=True) + mesa(bits=4)", 0.1, 7.2),
    ],
)
def test_bytes_of_a_block_with_eager_attention(recipe, dropout, most, d):
    recipe = recipe.format(r=d // 64)
    counted, allocated = per_token_and_layer(d, recipe, attention="eager", dropout=dropout)
    print(f"{recipe}, dropout {dropout}: {counted:.3f} d counted, {allocated:.3f} d allocated")
    assert counted <= most and allocated <= most


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("attention, dropout, size", [("sdpa", 0.0, 43.1), ("eager", 0.0, 58.0), ("eager", 0.1, 62.0)])
def test_what_transformers_keeps(attention, dropout, size, d):
    """The figures that the others stand beside."""
    counted, allocated = per_token_and_layer(d, None, attention=attention, dropout=dropout)
    print(f"{attention}, dropout {dropout}: {counted:.3f} d counted, {allocated:.3f} d allocated")
    assert counted == pytest.approx(size, abs=0.1) and allocated == pytest.approx(size, abs=0.1)
