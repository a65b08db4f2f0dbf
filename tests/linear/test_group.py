"""Layers that read one tensor work as one: the same values and gradients, whatever base, delta and keep they have, in
whatever order they are called."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from efftune import Linear
from efftune.linear import Dense, Int8, LoRA, NoDelta
from efftune.linear.delta.trained import Trained
from tests.budget import assert_within_budget
from tests.linear.grouped import LORA, as_one, assert_formula, flat, one_by_one, slopes, three, together, trained
from tests.linear.test_contracts import VALID, K, M, N, expected, inputs, made
from tests.linear.toys import Kronecker
from tests.saved import saved_bytes


@pytest.mark.parametrize("base, delta", VALID, ids=str)
def test_values_and_gradients_are_those_of_the_formula(base, delta):
    layers, (x, _) = three(base, delta), inputs()
    assert_formula(layers, x, slopes(layers), as_one(layers, x, slopes(layers), order=(1, 2, 0)))


@pytest.mark.parametrize("base, delta", VALID, ids=str)
def test_a_delta_adds_its_dx_to_what_it_is_given(base, delta):
    """Also where another delta comes first, and where W is rotated."""
    layers, (x, _) = [made(Dense(), NoDelta()), made(base, delta), made(Dense(), LORA)], inputs()
    dys = slopes(layers)
    assert_formula(layers, x, dys, as_one(layers, x, dys))


def test_layers_of_different_sizes_bases_deltas_and_biases():
    torch.manual_seed(0)
    layers = [
        Linear.from_linear(nn.Linear(K, n, bias=bias, dtype=torch.float64).requires_grad_(False), base, delta)
        for n, bias, base, delta in (
            (N, True, Dense(), LORA), (4, False, Int8(8), LORA), (8, True, Dense(), LoRA(r=2, dtype=None)),
            (12, False, Dense(), Trained()), (16, False, Dense(), Kronecker()),
        )
    ]  # fmt: skip
    layers[0].bias.requires_grad_()  # an adapter and a bias
    for layer in layers:
        for name in ("lora_b", "kron_p"):
            if name in layer._parameters:
                nn.init.normal_(getattr(layer, name))
    x = torch.randn(2, 5, K, dtype=torch.float64)
    dys = [torch.randn(2, 5, layer.out_features, dtype=torch.float64) for layer in layers]
    for got, right in zip(flat(as_one(layers, x, dys)), flat(one_by_one(layers, x, dys)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def by_hand(layers, x, dys, dtype, rounded=lambda t: t):
    """As `as_one`, of LoRA over a dense W, in dtype; `rounded` is applied where something is rounded to x.dtype."""
    ys, dhs, thin, grads, x = [], [], [], [], x.to(dtype)
    for layer, dy in zip(layers, dys, strict=True):
        a, b = (rounded(t.detach().to(dtype)) for t in layer.added())
        h, dh = rounded(layer.delta.scale * (x @ a.t())), rounded(layer.delta.scale * (dy.to(dtype) @ b))
        w, bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
        ys.append(rounded(rounded(x @ w.t() + bias) + h @ b.t()))
        grads += [rounded(dh.t() @ x), rounded(dy.to(dtype).t() @ h)]
        dhs, thin = [*dhs, dh], [*thin, a]
    dx = rounded(torch.cat(dhs, 1) @ torch.cat(thin))
    for layer, dy in zip(layers, dys, strict=True):
        dx = rounded(dx + dy.to(dtype) @ layer.weight.detach().to(dtype))
    return *ys, dx, *grads


@pytest.mark.parametrize("m", [1, 0, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta", [LoRA(r=4), LoRA(r=3, dtype=None, lora_alpha=7)], ids=str)
def test_values_and_gradients_are_within_budget(delta, dtype, m):
    layers = [layer.to(dtype) for layer in three(delta=delta, dtype=torch.float32)]
    torch.manual_seed(5)
    x, dys = torch.randn(m, K).to(dtype), slopes(layers, m)
    oracle, in_float32 = by_hand(layers, x, dys, torch.float64), by_hand(layers, x, dys, torch.float32)
    rounded = by_hand(layers, x, dys, torch.float64, lambda t: t.to(dtype).double())
    for got, right, coarse, way in zip(flat(as_one(layers, x, dys)), oracle, in_float32, rounded, strict=True):
        assert_within_budget(got, right, coarse, way)


def test_what_nobody_uses_has_no_gradient_and_the_others_have_theirs():
    layers, (x, _) = three(), inputs()
    x.requires_grad_()
    with together(layers):
        ys = [layer(x) for layer in layers]
    (ys[1] * slopes(layers)[1]).sum().backward()
    assert all(p.grad is None for p in (*trained(layers[:1]), *trained(layers[2:])))
    _, dx, grads = expected(layers[1], x.detach(), slopes(layers)[1])
    for got, right in zip((x.grad, *(p.grad for p in trained(layers[1:2]))), (dx, *grads), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_after_many_steps_too():
    """Versions are large numbers then, and no longer the same objects."""
    layers, (x, _) = three(), inputs()
    for p in trained(layers):
        for _ in range(300):
            p.data.mul_(1.0)
            torch._C._increment_version([p])
    as_one(layers, x, slopes(layers))


def test_in_evaluation_mode_and_in_two_modes():
    layers, (x, _) = three(), inputs()
    for modes in ((False, False, False), (True, False, True)):
        for layer, mode in zip(layers, modes, strict=True):
            layer.train(mode)
        dys = slopes(layers)
        assert_formula(layers, x, dys, as_one(layers, x, dys))


def test_layers_that_are_frozen_between_steps():
    layers, (x, _) = three(), inputs()
    for frozen in ((1,), (0, 2), (0, 1, 2), ()):
        for i, layer in enumerate(layers):
            layer.lora_a.requires_grad_(i not in frozen)
            layer.lora_b.requires_grad_(i not in frozen)
        dys = slopes(layers)
        for got, right in zip(*(flat(f(layers, x, dys)) for f in (as_one, one_by_one)), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_a_part_of_an_adapter_that_is_frozen():
    layers, (x, _) = three(), inputs()
    layers[0].lora_a.requires_grad_(False)
    layers[1].lora_b.requires_grad_(False)
    dys = slopes(layers)
    for got, right in zip(*(flat(f(layers, x, dys)) for f in (as_one, one_by_one)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_where_x_needs_no_gradient():
    layers, (x, _) = three(), inputs()
    dys = slopes(layers)
    with together(layers):
        ys = [layer(x) for layer in layers]
    grads = torch.autograd.grad(ys, trained(layers), dys)
    right = torch.autograd.grad([layer(x) for layer in layers], trained(layers), dys)
    for got, alone in zip(grads, right, strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-10, atol=1e-12)
    layers[1].requires_grad_(False)
    with together(layers):
        assert [layer(x).requires_grad for layer in layers] == [True, False, True]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["all", "first", "last"])
def test_under_checkpointing(inside, reentrant):
    """Where a part of the layers is called again in backward, they save what they saved before."""
    layers, (x, _) = three(), inputs()
    dys, found = slopes(layers), []
    for grouped in (True, False):
        at = x.clone().requires_grad_()

        def run(at, grouped=grouped):
            with together(layers) if grouped else contextlib.nullcontext():
                if inside == "all":
                    return [layer(at) for layer in layers]
                again = {"first": 0, "last": 2}[inside]
                return [
                    checkpoint(layer, at, use_reentrant=reentrant) if i == again else layer(at)
                    for i, layer in enumerate(layers)
                ]

        ys = checkpoint(lambda at: tuple(run(at)), at, use_reentrant=reentrant) if inside == "all" else run(at)  # noqa: B023
        torch.autograd.backward(ys, dys)
        found.append([*ys, at.grad, *(p.grad for p in trained(layers))])
        for p in trained(layers):
            p.grad = None
    for got, right in zip(*found, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_a_graph_that_is_kept_gives_its_gradients_twice_and_no_second_derivative():
    layers, (x, _) = three(), inputs()
    x.requires_grad_()
    with together(layers):
        y = sum((layer(x) * dy).sum() for layer, dy in zip(layers, slopes(layers), strict=True))
    first = torch.autograd.grad(y, [x, *trained(layers)], retain_graph=True)
    again = torch.autograd.grad(y, [x, *trained(layers)], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match=r"[Ss]econd"):
        torch.autograd.grad(y, x, create_graph=True)


def test_gradients_belong_to_the_caller_and_inputs_are_unchanged():
    layers, (x, _) = three(), inputs()
    dys = slopes(layers)
    before = [t.clone() for t in (x, *dys, *(p for layer in layers for p in layer.parameters()))]
    first = flat(as_one(layers, x, dys))
    for t in first:
        t.zero_()
    for t, kept in zip((x, *dys, *(p for layer in layers for p in layer.parameters())), before, strict=True):
        assert torch.equal(t, kept)


@pytest.mark.parametrize("delta", [LORA, LoRA(r=4), Trained(), NoDelta(), Kronecker()], ids=str)
def test_no_more_is_saved_than_by_layers_alone(delta):
    layers = nn.ModuleList(three(delta=delta))
    x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)

    def run(group):
        with group(layers):
            return [layer(x) for layer in layers]

    as_one, alone = (
        saved_bytes(lambda g=g: run(g), layers) for g in (together, lambda layers: contextlib.nullcontext())
    )
    assert as_one == alone


def test_a_kind_with_a_forward_of_its_own_is_not_computed_as_its_parent():
    class Twice(LoRA):
        def forward(self, c, x):
            y, saved = super().forward(c, x)
            return y.mul_(2), saved

        def backward(self, c, dy, saved, add=None):
            dx, dws, dps = super().backward(c, 2 * dy, saved, add)
            return dx, dws, dps

    layers, (x, _) = three(delta=Twice(r=4, dtype=None)), inputs()
    dys = slopes(layers)
    for got, right in zip(*(flat(f(layers, x, dys)) for f in (as_one, one_by_one)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_a_group_that_another_thread_ends_in_the_middle_of_a_call():
    class Ends:
        def output(self, layer, x):
            return x.new_ones(len(x), layer.out_features)

    class Shared(Linear):
        group = property(lambda self: reads.pop())

    reads = [None, Ends()]  # there at the first look, gone at the second
    layer = Linear.from_linear(nn.Linear(4, 6))
    layer.__class__ = Shared
    assert torch.equal(layer(torch.randn(2, 4)), torch.ones(2, 6)) and reads == [None]
