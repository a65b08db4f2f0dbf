"""DoRA by itself: against PEFT, what it keeps, and what happens at its edges."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efftune import EfftuneError, Linear
from efftune.linear import Dense, Exact, Int8, LoRA, Nothing
from efftune.linear.delta import dora
from efftune.linear.delta.dora import DoRA
from efftune.memory import meter
from tests.budget import assert_within_budget
from tests.linear.layers import K, M, Mask, N, assert_as_peft, gradients, inputs, plain

R = 8


def layer(delta=None, linear=None, **axes):
    made = Linear.from_linear(linear or plain(), delta=delta or DoRA(r=R), **axes)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        made.lora_b.copy_(torch.randn(made.lora_b.shape, generator=g) / 8)
        made.lora_magnitude_vector.mul_(torch.rand(made.out_features, generator=g) + 0.5)
    return made


def in_peft(ours, linear, dtype, seed=None):
    """The same layer in PEFT, all of it in dtype."""
    from peft import LoraConfig, get_peft_model

    delta = ours.delta
    settings = dict(r=delta.r, lora_alpha=delta.scale * delta.r, lora_dropout=delta.lora_dropout)
    if delta.use_rslora:
        settings |= dict(use_rslora=True, lora_alpha=delta.lora_alpha)
    model = nn.Sequential(copy.deepcopy(linear).to(dtype))
    config = LoraConfig(target_modules=["0"], use_dora=True, **settings)
    theirs = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_a)
        theirs.lora_B["default"].weight.copy_(ours.lora_b)
        theirs.lora_magnitude_vector["default"].weight.copy_(ours.lora_magnitude_vector)
    if delta.lora_dropout:
        theirs.lora_dropout["default"] = Mask(delta.lora_dropout, seed)
    theirs.to(dtype)  # PEFT makes the norm of its own dtype
    return theirs, [
        theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, theirs.lora_magnitude_vector["default"].weight
    ]  # fmt: skip


SETTINGS = [
    DoRA(r=R), DoRA(r=R, lora_alpha=20), DoRA(r=R, lora_alpha=6, use_rslora=True), DoRA(r=R, lora_dropout=0.25)
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("delta", SETTINGS, ids=str)
def test_outputs_and_gradients_are_pefts(delta, bias, dtype, monkeypatch):
    """In float64 to its last digits; below, no further from that than PEFT is in the same dtype."""
    seed = torch.tensor(11)
    monkeypatch.setattr("efftune.linear.module.draw_seed", lambda: seed)
    linear = plain(bias, dtype)
    ours = layer(delta, linear)
    assert_as_peft(ours, lambda dtype: in_peft(ours, linear, dtype, seed), dtype)


def test_it_starts_as_the_plain_layer():
    for base in (Dense(), Int8(group=16)):
        stored = Linear.from_linear(plain(), base=base)
        x, _ = inputs()
        w = stored.base.rows(stored.stored(), 0, N, torch.float64)
        exact = F.linear(x.double(), w, plain().bias.double())
        fresh = Linear.from_linear(stored, delta=DoRA(r=R))
        assert_within_budget(fresh(x).detach(), exact, F.linear(x, w.float(), plain().bias))


def test_a_weight_that_changes_is_seen():
    ours, (x, _) = layer(), inputs()
    before = ours(x)
    other = ours.state_dict() | {"weight": torch.randn(N, K)}
    ours.load_state_dict(other)
    moved = ours.weight + ours.delta.scale * ours.lora_b @ ours.lora_a
    right = F.linear(x, moved * (ours.lora_magnitude_vector / moved.norm(dim=1))[:, None], ours.bias)
    torch.testing.assert_close(ours(x), right, rtol=1e-4, atol=1e-4)
    assert (before - right).norm() > right.norm() / 2


# What backward keeps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(dtype):
    from peft import LoraConfig, get_peft_model

    m, k, n, r = 128, 96, 64, 4
    linear = plain(True, dtype, n, k)
    x = torch.randn(m, k, dtype=dtype, requires_grad=True)
    each = dtype.itemsize
    h, y, g = m * r * each, m * n * each, n * 4

    def kept(made, call=lambda y: y):
        return meter.saved_for_backward(made, lambda: call(made(x))).total

    ours = layer(DoRA(r=r), linear)
    assert kept(ours) == x.nbytes + h + y + g
    assert kept(ours, F.silu) == x.nbytes + h + y + g  # silu reads the tensor that is kept
    lora = Linear.from_linear(linear, delta=LoRA(r=r))
    assert kept(ours, F.silu) == kept(lora, F.silu) + g
    seed = 8
    dropped = layer(DoRA(r=r, lora_dropout=0.1), linear)
    assert kept(dropped) == x.nbytes + h + y + g + seed
    for p in (ours.lora_a, ours.lora_b):
        p.requires_grad_(False)
    assert kept(ours) == y + g
    ours.lora_magnitude_vector.requires_grad_(False)
    assert kept(ours) == g
    config = LoraConfig(r=r, target_modules=["0"], use_dora=True)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(linear)), config).base_model.model[0]
    assert kept(theirs) > (1.8 if dtype == torch.float32 else 3.3) * kept(layer(DoRA(r=r), linear))


@pytest.mark.parametrize("shape", [(M, K), (4, M // 4, K)])
def test_a_change_of_the_output_in_place_is_an_error(shape):
    ours, (x, _) = layer(), inputs()
    y = ours(x.view(shape))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    ours.lora_magnitude_vector.requires_grad_(False)  # then nothing is read off it
    y = ours(x.view(shape))
    y.add_(1)
    y.sum().backward()


def test_w_is_read_in_tiles(monkeypatch):
    """No tensor of N x K, forward and backward, or beside the merged one."""
    monkeypatch.setattr(dora, "TILE", 2**14)
    ours = layer(DoRA(r=2), plain(False, n=1024, k=1024))
    x, dy = inputs(m=8, k=1024, n=1024)
    x.requires_grad_()
    ours(x).backward(dy)
    _, peak = meter.allocated(lambda: ours(x).backward(dy))
    assert peak < 0.1 * ours.weight.nbytes


# Edges


def test_a_row_of_zeros_stays_finite():
    linear = plain()
    linear.weight.data[3] = 0
    ours = Linear.from_linear(linear, delta=DoRA(r=R))
    x, dy = inputs()
    y, *grads = gradients(ours, ours.added(), x, dy)
    torch.testing.assert_close(y, linear(x), rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in grads) and grads[-1][3] == 0
    assert torch.equal(ours.merge().weight[3], linear.weight[3])


def test_a_magnitude_of_zero_stays_finite():
    ours, (x, dy) = layer(), inputs()
    ours.lora_magnitude_vector.data[5] = 0
    y, *grads = gradients(ours, ours.added(), x, dy)
    assert torch.equal(y[:, 5], ours.bias[5].expand(M)) and all(g.isfinite().all() for g in grads)


def test_over_a_transposed_weight():
    ours, (x, dy) = layer(), inputs()
    turned = Linear.from_linear(ours, base=Dense(transposed=True))
    for got, right in zip(gradients(turned, turned.added(), x, dy), gradients(ours, ours.added(), x, dy), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_with_a_frozen_no_input_is_kept():
    frozen = DoRA(r=R, freeze_a=True)
    ours, (x, dy) = layer(frozen, keep=Nothing()), inputs()
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == ["lora_b", "lora_magnitude_vector"]
    right = layer()
    for name in frozen.learns:
        expected = torch.autograd.grad(right(x), getattr(right, name), dy)[0]
        torch.testing.assert_close(torch.autograd.grad(ours(x), getattr(ours, name), dy)[0], expected)


@pytest.mark.parametrize("settings, keep, sentence", [
    (dict(r=R), Nothing(), r"needs the layer's input in backward and keep=Nothing\(\) drops it; use keep=Exact\(\)"),
    (dict(r=N + 1), Exact(), rf"r={N + 1} exceeds min\(N, K\) = {N} .* choose a smaller r"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused_in_words(settings, keep, sentence):
    with pytest.raises(EfftuneError, match=sentence):
        Linear.from_linear(plain(), delta=DoRA(**settings), keep=keep)
