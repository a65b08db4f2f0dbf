"""GPT-2's Conv1D is a linear layer with its weight the other way round."""

import copy

import pytest
import torch
from torch import nn

import efftune
from efftune import Linear
from efftune.linear import Dense, Int8, LoRA, Trained
from tests.budget import assert_within_budget
from tests.nn.families import batch, loss, model

transformers = pytest.importorskip("transformers")


def conv1d(n, k, dtype=torch.float32):
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(n, k)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta", [Trained(), LoRA(r=3)], ids=str)
def test_values_and_gradients(delta, dtype):
    plain = conv1d(12, 20, dtype)
    layer = Linear.from_linear(copy.deepcopy(plain), delta=delta)
    assert layer.base == Dense(transposed=True) and (layer.out_features, layer.in_features) == (12, 20)
    if isinstance(delta, LoRA):
        nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 7, 20).to(dtype)
    results = []
    for kind in (torch.float64, torch.float32):
        w = plain.weight.detach().to(kind).requires_grad_()
        z = x.to(kind).requires_grad_()
        y = z @ w + plain.bias.detach().to(kind)
        if isinstance(delta, LoRA):
            a, b = (t.detach().to(dtype).to(kind) for t in (layer.lora_a, layer.lora_b))
            y = y + (z @ a.t()).to(dtype).to(kind) @ b.t() if kind == torch.float32 else y + z @ a.t() @ b.t()
        y.sum().backward()
        results.append([y.detach(), z.grad, w.grad])
    z = x.clone().requires_grad_()
    y = layer(z)
    y.sum().backward()
    got = [y.detach(), z.grad, layer.weight.grad if isinstance(delta, Trained) else None]
    for found, exact, single in zip(got, *results, strict=True):
        if found is not None:
            assert_within_budget(found, exact, single)


def test_merging_gives_a_conv1d_back():
    plain = conv1d(12, 20)
    x = torch.randn(5, 20)
    for base in (Dense(transposed=True), Int8(group=4)):
        layer = Linear.from_linear(copy.deepcopy(plain), base=base, delta=LoRA(r=3))
        nn.init.normal_(layer.lora_b)
        merged = layer.merge()
        assert type(merged) is type(plain) and merged.weight.shape == plain.weight.shape
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-5, atol=1e-5)
        again = Linear.from_linear(layer, keep=efftune.linear.Nothing(), delta=efftune.linear.NoDelta()).merge()
        assert type(again) is type(plain)


@pytest.mark.parametrize("recipe", ["full", "lora(r=4)", "int8(group=8) + lora(r=4)", "full + mesa(bits=8)"])
def test_recipes_on_gpt2(recipe):
    gpt2 = model("GPT2")
    structure = str(gpt2)
    torch.manual_seed(1)
    tuner = efftune.apply(gpt2, recipe)
    layers = [m for m in gpt2.modules() if isinstance(m, Linear)]
    assert len(layers) == 8 and all(layer.conv1d for layer in layers)  # 2 blocks of c_attn, c_proj, c_fc, c_proj
    optimizer = tuner.optimizer(lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(float(tuner.backward(batch(), loss)))
        optimizer.step()
    assert losses[-1] < losses[0]
    expected = gpt2.eval()(**batch()).logits
    tuner.merge()
    assert str(gpt2) == structure
    torch.testing.assert_close(gpt2(**batch()).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_gpt2_is_one_of_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    tuner = efftune.apply(model("GPT2"), "lora(r=4)")
    for layer in (m for m in tuner.model.modules() if isinstance(m, Linear)):
        nn.init.normal_(layer.lora_b, std=0.1)
    tuner.save(tmp_path)
    expected = tuner.model.eval()(**batch()).logits
    theirs = peft.PeftModel.from_pretrained(model("GPT2"), tmp_path).eval()
    torch.testing.assert_close(theirs(**batch()).logits, expected, rtol=1e-4, atol=1e-5)
    ours = efftune.load(model("GPT2"), tmp_path).model.eval()
    assert torch.equal(ours(**batch()).logits, expected)
    theirs.save_pretrained(tmp_path / "peft")
    back = efftune.load(model("GPT2"), tmp_path / "peft").model.eval()
    torch.testing.assert_close(back(**batch()).logits, expected, rtol=1e-4, atol=1e-5)
