"""`layer.weight` over a base that stores codes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import efftune
from efftune import EfftuneError, Linear
from efftune.linear import Int8, LoRA, NoDelta


def coded(dtype=torch.float32, plain=None, delta=None):
    torch.manual_seed(0)
    layer = (plain or nn.Linear(24, 16)).to(dtype).requires_grad_(False)
    return Linear.from_linear(layer, base=Int8(group=8), delta=delta or LoRA(r=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_what_a_plain_layer_has(dtype):
    layer = coded(dtype)
    weight, plain = layer.weight, copy.deepcopy(layer).remove().weight
    assert isinstance(weight, torch.Tensor) and weight.dtype == dtype and weight.shape == plain.shape == (16, 24)
    assert weight.device == plain.device and weight.dim() == 2 and weight.numel() == 384 and not weight.requires_grad
    x = torch.randn(5, 24, dtype=dtype, requires_grad=True)
    for use in (
        lambda w: F.linear(x, w), lambda w: x @ w.t(), lambda w: w[3] * x, lambda w: w.float(), lambda w: w.data + 1,
        lambda w: w.detach().clone(), lambda w: torch.cat([w, w]), lambda w: torch.einsum("nk,mk->mn", w, x),
    ):  # fmt: skip
        found, expected = use(layer.weight), use(plain)
        assert torch.equal(found + 0, expected)
    dx, expected = (torch.autograd.grad(F.linear(x, w).square().sum(), x)[0] for w in (layer.weight, plain))
    assert torch.equal(dx, expected)
    assert (
        "Int8" in repr(weight) and "weight" not in layer.state_dict() and "weight" not in dict(layer.named_parameters())
    )


def test_it_takes_no_memory_and_no_writes(monkeypatch):
    layer = coded()
    with monkeypatch.context() as patch:
        patch.setattr(Int8, "rows", lambda *args: 1 / 0)
        assert layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu" and layer.weight.shape[0] == 16
        with pytest.raises(ZeroDivisionError):
            _ = layer.weight + 0
    with pytest.raises(EfftuneError, match="stores codes, into which its weight cannot be written"):
        with torch.no_grad():
            layer.weight.mul_(2)
    with pytest.raises(EfftuneError, match="stores codes"):
        nn.init.zeros_(layer.weight)
    assert torch.equal(torch.zeros(16, 24).add_(layer.weight), layer.weight + 0)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.copy_(torch.zeros(16, 24)), lambda w: w.data.normal_(), lambda w: w.data.mul_(2),
        lambda w: w.__setitem__(0, 1.0), lambda w: w.__setitem__((slice(None), 0), 1.0), lambda w: w.t().mul_(2),
        lambda w: w.view(-1).zero_(), lambda w: w.detach().zero_(), lambda w: w[1:3][0].fill_(1),
        lambda w: torch.add(torch.ones(16, 24), 1, out=w), lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: torch._foreach_copy_([w], [torch.zeros(16, 24)]), lambda w: w.unbind()[0].zero_(),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(write):
    layer = coded()
    before = layer.weight + 0
    with torch.no_grad(), pytest.raises(EfftuneError, match="stores codes, into which its weight cannot be written"):
        write(layer.weight)
    assert torch.equal(layer.weight + 0, before)


@pytest.mark.parametrize("other", [torch.zeros(16, 24), nn.Parameter(torch.zeros(16, 24))])
def test_another_weight_is_refused(other):
    layer = coded()
    with pytest.raises(EfftuneError, match="give the plain layer another weight"):
        layer.weight = other
    with pytest.raises(EfftuneError, match="which do not train"):
        layer.weight.requires_grad_()
    layer.weight.requires_grad_(False)


def test_a_conv1d_has_it_in_its_own_layout():
    layer = coded(plain=Conv1D(16, 24))
    assert layer.weight.shape == (24, 16)
    assert torch.equal(layer.weight + 0, copy.deepcopy(layer).remove().weight)


def test_a_dense_one_is_the_parameter():
    plain = nn.Linear(24, 16).requires_grad_(False)
    layer = Linear.from_linear(plain, delta=LoRA(r=2))
    assert layer.weight is plain.weight
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = layer.wait


def test_what_it_learns_is_not_left_without_a_gradient():
    tuner = efftune.apply(nn.Sequential(nn.Linear(24, 16)), "int8 + peqa")
    layer = tuner.model[0]
    assert layer.weight.dtype == torch.float32 and layer.scales.requires_grad
    with pytest.raises(EfftuneError, match="reads the weight of Linear.* without calling the layer"):
        F.linear(torch.randn(2, 24), layer.weight)
    with torch.no_grad():
        assert torch.equal(layer.weight + 0, copy.deepcopy(layer).remove().weight)


def test_under_the_compiler():
    layer = coded(delta=NoDelta())

    def run(x):
        return layer(x.to(layer.weight.dtype)) @ layer.weight

    x = torch.randn(3, 24)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x))


IDS = torch.arange(16).view(2, 8) + 3
SMALL = dict(vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
MODELS = {
    "T5": lambda: T5ForConditionalGeneration(T5Config(**SMALL)),
    "Switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**SMALL, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    ),
    "Mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)),
    "HunYuan-MoE": lambda: HunYuanMoEV1ForCausalLM(
        HunYuanMoEV1Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_experts=4, moe_topk=2, pad_token_id=0,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["int8 + lora(r=1)", "int8 + lora(r=1) + recompute"])
def test_models_that_look_at_a_weight(name, recipe):
    """Mamba multiplies by that of `dt_proj`; the others look at dtypes."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    batch = {"input_ids": IDS, "labels": IDS}
    try:
        tuner = efftune.apply(model, recipe)
    except EfftuneError as error:
        assert "recompute" in recipe, error
        pytest.skip(str(error))
    loss = tuner.backward(batch, lambda m, b: m(**b).loss)
    assert loss.isfinite() and any(p.grad is not None for p in tuner.named_trained().values())
    with torch.no_grad():
        logits = tuner.model(**batch).logits
        torch.testing.assert_close(tuner.merge()(**batch).logits, logits, rtol=1e-4, atol=1e-4)
