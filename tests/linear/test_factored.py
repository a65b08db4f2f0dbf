"""LoRA whose factors are functions of what trains: what stands beside its dropout, what W sees of it, what is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efftune import EfftuneError, Linear
from efftune.linear import Dense, Int8, LoRA, Nothing
from efftune.linear.delta.lora import DROPOUT_STREAM
from efftune.linear.keep.quantized import Quantized
from efftune.memory import meter
from efftune.ops.dropout import dropout
from tests.budget import assert_within_budget
from tests.linear.layers import K, N, gradients, inputs, plain
from tests.linear.toys import Kasa, Pissa, Vera

R = 8
KINDS = [Pissa(r=R), Pissa(r=R, lora_alpha=4), Vera(r=R), Kasa(r=R, lora_alpha=4)]


def trained(delta, linear=None, **axes):
    """A layer a few steps from its start."""
    made = Linear.from_linear(linear or plain(), delta=delta, **axes)
    g = torch.Generator().manual_seed(2)
    for name in made.delta.learns:
        p = getattr(made, name)
        p.data.add_(torch.randn(p.shape, generator=g), alpha=0.1)
    return made


def parts(layer, dtype):
    """A, B and the pair that is taken away, in dtype, from the formulas."""
    delta, p = layer.delta, [t.detach().to(dtype) for t in layer.added()]
    if isinstance(delta, Pissa):
        return p[0], p[1], p[2], p[3]
    if isinstance(delta, Kasa):
        return p[2].diag() @ p[0], p[1], p[3], p[4]
    return p[2].diag() @ p[0], p[3].diag() @ p[1], p[0].new_zeros(1, K), p[0].new_zeros(N, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta", KINDS, ids=str)
def test_values_and_dx_are_within_budget(delta, dtype):
    layer = trained(delta, plain(True, dtype))
    x, dy = inputs(dtype)
    y, dx = gradients(layer, [], x, dy)

    def formula(wide, rounded):
        w, s = layer.weight.to(wide), layer.delta.scale
        a, b, a0, b0 = parts(layer, wide)
        a, b, a0, b0 = rounded(a), rounded(b), rounded(a0), rounded(s * b0)
        h, h0 = rounded(s * (x.to(wide) @ a.t())), rounded(x.to(wide) @ a0.t())
        dh, dh0 = rounded(s * (dy.to(wide) @ b)), rounded(dy.to(wide) @ b0)
        y = F.linear(x.to(wide), w, layer.bias.to(wide)) + h @ b.t() - h0 @ b0.t()
        return y, dy.to(wide) @ w + dh @ a - dh0 @ a0

    exact = formula(torch.float64, lambda t: t)
    single = formula(torch.float32, lambda t: t.to(dtype).float())
    for got, right, float32 in zip((y, dx), exact, single, strict=True):
        assert_within_budget(got, right, float32)


@pytest.mark.parametrize("delta", [Pissa(r=R, lora_dropout=0.3), Kasa(r=R, lora_dropout=0.3)], ids=str)
def test_what_is_taken_from_w_is_taken_where_x_is_dropped_too(delta, monkeypatch):
    seed = torch.tensor(5)
    monkeypatch.setattr("efftune.linear.module.draw_seed", lambda: seed)
    layer = trained(delta).double()
    x, dy = (t.double() for t in inputs())
    y, dx = gradients(layer, [], x, dy)
    a, b, a0, b0 = parts(layer, torch.float64)
    s, x = delta.scale, x.requires_grad_()
    z = dropout(x.detach(), 0.3, seed, DROPOUT_STREAM) / x.detach() * x
    right = F.linear(x, layer.weight - s * b0 @ a0, layer.bias) + s * z @ a.t() @ b.t()
    torch.testing.assert_close(y, right.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dx, torch.autograd.grad(right, x, dy)[0], rtol=1e-10, atol=1e-10)
    ones = copy.deepcopy(layer).eval()
    torch.testing.assert_close(ones(x), ones.merge()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("base", [Dense(), Int8(group=16)], ids=str)
def test_w_is_shared_and_what_begins_in_it_changes_nothing(base):
    stored = Linear.from_linear(plain(), base=base)
    layer, (x, _) = Linear.from_linear(stored, delta=Pissa(r=R)), inputs()
    assert all(a is b for a, b in zip(layer.stored().tensors, stored.stored().tensors, strict=True))
    w = stored.base.rows(stored.stored(), 0, N, torch.float32)
    exact = F.linear(x.double(), w.double(), stored.bias.double())
    part = x @ layer.lora_a.t() @ layer.lora_b.t()
    assert_within_budget(layer(x).detach(), exact, F.linear(x, w, stored.bias) + part - part)
    layer.lora_b.data.mul_(2)
    torch.testing.assert_close(layer(x), exact.float() + part, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("delta", KINDS, ids=str)
def test_it_keeps_what_lora_keeps(delta):
    x, _ = inputs()
    x.requires_grad_()

    def kept(delta, **axes):
        layer = trained(delta, plain(False), **axes)
        return meter.saved_for_backward(layer, lambda: layer(x)).total

    for keep in (None, Quantized(8, 32)):
        assert kept(delta, keep=keep) == kept(LoRA(r=R), keep=keep)


def test_what_does_not_train_gets_no_gradient_and_what_rests_keeps_nothing():
    layer, (x, dy) = trained(Vera(r=R)), inputs()
    layer(x.requires_grad_()).backward(dy)
    assert [n for n, p in layer.named_parameters() if p.grad is not None] == ["v", "u"]
    layer.u.requires_grad_(False)
    layer.zero_grad()
    layer(x).backward(dy)
    assert layer.v.grad is not None and layer.u.grad is None
    layer.v.requires_grad_(False)
    assert meter.saved_for_backward(layer, lambda: layer(x)).total == 0
    layer(x).backward(dy)


def test_compiled_equals_eager():
    torch._dynamo.reset()
    for delta in (Vera(r=R), Kasa(r=R, lora_dropout=0.3)):
        layer, (x, dy) = trained(delta), inputs()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        trains = [p for p in layer.parameters() if p.requires_grad]
        found = []
        for call in (layer, compiled):
            torch.manual_seed(3)
            found.append(gradients(call, trains, x, dy))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_that_is_made_from_what_trains_is_not_frozen():
    with pytest.raises(EfftuneError, match="the A of Vera is made from what trains; leave freeze_a"):
        Vera(r=R, freeze_a=True)
    with pytest.raises(EfftuneError, match="needs the layer's input"):
        Linear.from_linear(nn.Linear(K, N), delta=Vera(r=R), keep=Nothing())
