"""A base takes over what a quantised layer of another library stores."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from efftune import EfftuneError, Linear
from efftune.linear import Dense, Int8, LoRA, NoDelta, Trained
from tests.linear.toys import Adopting, EightBits, FourBits, Rest, RowWise

N, K = 24, 32


def plain_layer(bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias, dtype=torch.float64).requires_grad_(False)


def dequantised(module):
    if isinstance(module, RowWise):
        return module.int_weight.t() * module.scale[:, None]
    return module.weight * module.scales


class DenseSeen(TorchDispatchMode):
    """Whether a floating-point tensor of as many elements as W has been made."""

    seen = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.seen |= out.is_floating_point() and out.numel() >= N * K
        return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("delta", [None, LoRA(r=4, dtype=None), Trained()], ids=str)
@pytest.mark.parametrize("group", [K, 8])
@pytest.mark.parametrize("kind", [RowWise, EightBits])
def test_a_quantised_layer_is_adopted_without_a_dense_weight(kind, group, delta, bias):
    foreign = kind(plain_layer(bias)).eval()
    with DenseSeen() as dense:
        layer = Linear.from_linear(foreign, base=Adopting(group), delta=delta)
    assert not dense.seen
    assert layer.delta == (delta or NoDelta()) and not layer.training
    x, w = torch.randn(5, K, dtype=torch.float64), dequantised(foreign)
    expected = nn.functional.linear(x, w, foreign.bias)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-12, atol=1e-12)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        None: set(), LoRA: {"lora_a", "lora_b"}, Trained: {"scales"}
    }[None if delta is None else type(delta)]  # fmt: skip
    torch.testing.assert_close(layer.remove().weight, w, rtol=1e-12, atol=0)


def test_what_has_the_same_layout_is_shared():
    foreign = EightBits(plain_layer())
    layer = Linear.from_linear(foreign, base=Adopting(K))
    assert layer.codes.data_ptr() == foreign.weight.data_ptr() and layer.scales is foreign.scales
    assert layer.bias is foreign.bias


def test_a_delta_that_begins_from_the_weight_gets_it():
    foreign, x = RowWise(plain_layer()), torch.randn(5, K, dtype=torch.float64)
    layer = Linear.from_linear(foreign, base=Adopting(8), delta=Rest(r=4, dtype=None))
    assert layer.lora_b.any()
    torch.testing.assert_close(layer(x).detach(), foreign(x), rtol=0.1, atol=0.05)  # the rest is quantised anew


@pytest.mark.parametrize("base", [Adopting(8), Dense()], ids=str)
def test_a_plain_layer_is_stored_as_ever(base):
    plain = plain_layer()
    layer = Linear.from_linear(plain, base=base)
    expected = Int8(8).store(plain.weight) if base != Dense() else (plain.weight,)
    assert all(torch.equal(a, b) for a, b in zip(layer.stored().tensors, expected, strict=True))


@pytest.mark.parametrize("kind", [RowWise, EightBits])
@pytest.mark.parametrize("base", [None, Dense(), Dense(transposed=True), Int8(), FourBits()], ids=str)
def test_a_base_that_cannot_adopt_is_refused(base, kind):
    with pytest.raises(EfftuneError, match=rf"{kind.__name__}.* put an nn.Linear with its dequantised weight in its "):
        Linear.from_linear(kind(plain_layer()), base=base)


def test_a_watched_layer_is_not_adopted():
    foreign = RowWise(plain_layer())
    foreign.register_forward_hook(lambda *_: None)
    with pytest.raises(EfftuneError, match="it has hooks"):
        Linear.from_linear(foreign, base=Adopting(8))
