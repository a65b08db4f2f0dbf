"""HiRA by itself: against PEFT, what it keeps, and what never exists at once."""

import copy

import pytest
import torch
from torch import nn

from efftune import EfftuneError, Linear
from efftune.linear import Exact, Int8, Nothing
from efftune.linear.delta import tiled
from efftune.linear.delta.hira import HiRA
from efftune.linear.keep.quantized import Quantized
from efftune.memory import meter
from tests.linear.layers import K, M, Mask, N, assert_as_peft, inputs, plain

R = 8


def layer(delta=None, linear=None, **axes):
    made = Linear.from_linear(linear or plain(), delta=delta or HiRA(r=R), **axes)
    g = torch.Generator().manual_seed(2)
    made.hira_b.data.copy_(torch.randn(made.hira_b.shape, generator=g))
    return made


def in_peft(ours, linear, dtype, seed=None):
    from peft import HiraConfig, get_peft_model

    model = nn.Sequential(copy.deepcopy(linear).to(dtype))
    config = HiraConfig(r=ours.delta.r, hira_dropout=ours.delta.hira_dropout, target_modules=["0"])
    theirs = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0].to(dtype)
    with torch.no_grad():
        theirs.hira_A["default"].copy_(ours.hira_a)
        theirs.hira_B["default"].copy_(ours.hira_b)
    if ours.delta.hira_dropout:
        theirs.hira_dropout["default"] = Mask(ours.delta.hira_dropout, seed)
    return theirs, [theirs.hira_A["default"], theirs.hira_B["default"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("delta", [HiRA(r=R), HiRA(r=R, hira_dropout=0.25)], ids=str)
def test_outputs_and_gradients_are_pefts(delta, bias, dtype, monkeypatch):
    """In float64 to its last digits; below, no further from that than PEFT is in the same dtype."""
    monkeypatch.setattr(tiled, "TILE", 5 * K)
    seed = torch.tensor(11)
    monkeypatch.setattr("efftune.linear.module.draw_seed", lambda: seed)
    linear = plain(bias, dtype)
    ours = layer(delta, linear)
    assert_as_peft(ours, lambda dtype: in_peft(ours, linear, dtype, seed), dtype)


def test_it_starts_as_the_plain_layer():
    fresh, (x, _) = Linear.from_linear(plain(), delta=HiRA(r=R)), inputs()
    assert torch.equal(fresh(x), plain()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(dtype):
    from peft import HiraConfig, get_peft_model

    linear = plain(False, dtype)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)

    def kept(made):
        return meter.saved_for_backward(made, lambda: made(x)).total

    assert kept(layer(linear=linear)) == x.nbytes
    assert kept(layer(HiRA(r=R, hira_dropout=0.1), linear)) == x.nbytes + 8  # the seed
    assert kept(layer(linear=linear, keep=Quantized(8, 32))) == M * K + M * K // 32 * 4 + 8
    config = HiraConfig(r=R, target_modules=["0"])
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(linear)), config).base_model.model[0]
    assert kept(theirs) > 2 * x.nbytes
    resting = layer(linear=linear).requires_grad_(False)
    assert kept(resting) == 0


@pytest.mark.parametrize("base", [None, Int8()], ids=str)
def test_no_tensor_is_as_large_as_w(base, monkeypatch):
    """A product over int8 holds W for its duration, and nothing else is held then."""
    monkeypatch.setattr(tiled, "TILE", 2**14)
    ours = layer(HiRA(r=2), plain(False, n=1024, k=1024), base=base)
    x, dy = inputs(m=8, k=1024, n=1024)
    x.requires_grad_()
    ours(x).backward(dy)
    _, peak = meter.allocated(lambda: ours(x).backward(dy))
    assert peak < (0.2 if base is None else 1.2) * 1024 * 1024 * 4


@pytest.mark.parametrize("settings, keep, sentence", [
    (dict(r=R), Nothing(), r"needs the layer's input in backward and keep=Nothing\(\) drops it; use keep=Exact\(\)"),
    (dict(r=N + 1), Exact(), rf"r={N + 1} exceeds min\(N, K\) = {N} .* choose a smaller r"),
    (dict(r=0), Exact(), "hira needs a rank of at least 1, not r=0"),
    (dict(hira_dropout=1.0), Exact(), r"hira_dropout is a probability in \[0, 1\), not 1.0"),
    (dict(dtype="int8"), Exact(), "hira's dtype is 'float32', 'bfloat16', 'float16' or None, not 'int8'"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused_in_words(settings, keep, sentence):
    with pytest.raises(EfftuneError, match=sentence):
        Linear.from_linear(plain(), delta=HiRA(**settings), keep=keep)
