"""Expressions that are computed in tiles of rows: what is kept, what is made again, and what never exists at once."""

from unittest import mock

import pytest
import torch

from efftune import EfftuneError, Linear
from efftune.linear import Exact, Int8, Nothing
from efftune.linear.delta import tiled
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled
from efftune.memory import meter
from tests.linear.layers import K, M, gradients, inputs, plain
from tests.linear.toys import LoHa


def layer(linear=None, **axes):
    made = Linear.from_linear(linear or plain(), delta=LoHa(), **axes)
    made.one_b.data.copy_(torch.randn(made.one_b.shape, generator=torch.Generator().manual_seed(2)))
    return made


def test_no_tensor_is_as_large_as_w(monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 2**14)
    made, (x, dy) = layer(plain(False, n=1024, k=1024)), inputs(m=8, k=1024, n=1024)
    x.requires_grad_()
    made(x).backward(dy)
    _, peak = meter.allocated(lambda: made(x).backward(dy))
    assert peak < 0.2 * made.weight.nbytes


@pytest.mark.parametrize("keep", [Exact(), Quantized(8, 32), Sampled(0.5, min_rows=2)], ids=str)
def test_what_was_kept_is_made_again_once(keep, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 5 * K)
    made, (x, dy) = layer(keep=keep), inputs()
    with mock.patch.object(type(keep), "operands", autospec=True, side_effect=type(keep).operands) as operands:
        made(x).backward(dy)
    assert operands.call_count == 1


def test_a_base_is_not_unpacked_for_an_expression_without_w():
    made, (x, dy) = layer(plain(dtype=torch.bfloat16), base=Int8(group=16)), inputs(torch.bfloat16)
    with mock.patch.object(Int8, "rows", side_effect=AssertionError):
        made(x).backward(dy)


def test_what_rests_keeps_nothing_and_gets_nothing():
    made, (x, dy) = layer(), inputs()
    assert meter.saved_for_backward(made, lambda: made(x.requires_grad_())).total == x.nbytes
    made.two_a.requires_grad_(False)
    made(x).backward(dy)
    assert made.two_a.grad is None and made.two_b.grad is not None
    _, dx = gradients(made, [], x, dy)
    made.requires_grad_(False)
    assert meter.saved_for_backward(made, lambda: made(x)).total == 0
    assert torch.equal(gradients(made, [], x, dy)[1], dx)


def test_compiled_equals_eager(monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 5 * K)
    torch._dynamo.reset()
    made, (x, dy) = layer(), inputs(m=M)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    found = [gradients(call, made.added(), x, dy) for call in (made, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_keep_that_drops_the_input_is_refused_in_words():
    with pytest.raises(EfftuneError, match=r"keep=Nothing\(\) drops it; use keep=Exact\(\)"):
        layer(keep=Nothing())
