"""Of layers that read one tensor, those compute alone that are called otherwise, have changed, draw or are watched."""

import contextlib

import pytest
import torch
from torch import nn

from efftune import Linear
from efftune.linear import Dense, Exact, LoRA, NoDelta, Nothing
from efftune.linear.delta.dora import DoRA
from efftune.linear.delta.trained import Trained
from efftune.linear.group import SMALL
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled
from tests.linear.grouped import LORA, assert_formula, slopes, three, together, trained
from tests.linear.test_contracts import K, M, inputs, made
from tests.linear.toys import Masked


@pytest.mark.parametrize("delta", [LORA, DoRA(r=4, dtype=None), Masked(), NoDelta()], ids=str)
def test_who_is_not_called_is_not_waited_for(delta):
    layers, (x, _) = three(delta=delta), inputs()
    x.requires_grad_()
    with together(layers) as group:
        ys = [layers[2](x), layers[0](x)]
    assert ys[0].grad_fn is ys[1].grad_fn and list(group.results) == [layers[1]]
    dys = slopes(layers)
    called = [layers[2], layers[0]]
    found = torch.autograd.grad(ys, [x, *trained(called)], [dys[2], dys[0]])
    assert_formula(called, x.detach(), [dys[2], dys[0]], ([y.detach() for y in ys], *found))


def test_few_elements_are_computed_alone(monkeypatch):
    monkeypatch.setattr("efftune.linear.group.SMALL", SMALL)
    layers = three()
    for rows in SMALL // K - 1, SMALL // K:
        x = torch.randn(rows, K, dtype=layers[0].weight.dtype, requires_grad=True)
        with together(layers):
            ys = [layer(x) for layer in layers]
        assert len({y.grad_fn for y in ys}) == (3 if x.numel() < SMALL else 1)


def test_a_layer_that_is_called_twice_computes_alone_the_second_time():
    layers, (x, _) = three(), inputs()
    x.requires_grad_()
    with together(layers):
        ys = [layers[0](x), layers[1](x), layers[1](x), layers[0](x), layers[2](x)]
    assert ys[0].grad_fn is ys[1].grad_fn is ys[4].grad_fn
    assert len({y.grad_fn for y in ys}) == 3
    order, dys = (0, 1, 1, 0, 2), slopes([layers[i] for i in (0, 1, 1, 0, 2)])
    found = torch.autograd.grad(ys, [x, *trained(layers)], dys)
    alone = [layers[i](x) for i in order]
    for got, right in zip(found, torch.autograd.grad(alone, [x, *trained(layers)], dys), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_another_tensor_and_a_changed_one_are_computed_alone():
    layers, (x, _) = three(delta=NoDelta()), inputs()
    x = x.requires_grad_() * 1
    with together(layers):
        layers[0](x)
        other = layers[1](x + 1)
        x.mul_(2)
        changed = layers[2](x)
    torch.testing.assert_close(other, layers[1](x / 2 + 1))
    assert torch.equal(changed, layers[2](x))


@pytest.mark.parametrize("name", ["weight", "lora_b", "bias"])
@pytest.mark.parametrize("how", ["in place", "another"])
def test_a_layer_that_has_changed_since_computes_alone(name, how):
    layers, (x, _) = three(), inputs()
    with together(layers):
        layers[0](x)
        with torch.no_grad():
            p = getattr(layers[1], name)
            if how == "another":
                setattr(layers[1], name, nn.Parameter(p * 3, requires_grad=p.requires_grad))
            else:
                p.mul_(3)
        y = layers[1](x)
    assert torch.equal(y, layers[1](x))


@pytest.mark.parametrize("change", [lambda m: m.requires_grad_(False), lambda m: setattr(m, "keep", Nothing())])
def test_what_else_has_changed_since_is_seen(change):
    layers, (x, _) = three(delta=LoRA(r=4, dtype=None, freeze_a=True)), inputs()
    x.requires_grad_()
    with together(layers):
        first = layers[0](x)
        change(layers[1])
        assert layers[1](x).grad_fn is not first.grad_fn


def compiled(layers, x):
    return torch.compile(lambda x: [layer(x) for layer in layers], backend="aot_eager", fullgraph=True)(x)


def under_autocast(layers, x):
    with torch.autocast("cpu", torch.bfloat16):
        return [layer(x) for layer in layers]


@pytest.mark.parametrize("call", [compiled, under_autocast])
def test_each_alone_where_nothing_is_gained_or_known(call):
    layers = three(dtype=torch.float32)
    x = torch.randn(M, K, requires_grad=True)
    right = call(layers, x)
    with together(layers) as group:
        ys = call(layers, x)
        assert group.x is None
    for got, alone in zip(ys, right, strict=True):
        assert torch.equal(got, alone) and got.requires_grad == alone.requires_grad


def test_without_gradients_the_bits_are_the_same():
    """As where a block is run again in backward. A result of one mode is not given in the other."""
    layers = three(dtype=torch.float32)
    x = torch.randn(M, K)
    with together(layers) as group:
        right = [layer(x) for layer in layers]
    with together(layers) as group, torch.no_grad():
        ys = [layer(x) for layer in layers]
        assert not group.results
    assert all(torch.equal(a, b) and not a.requires_grad and b.requires_grad for a, b in zip(ys, right, strict=True))
    for first, then in ((torch.no_grad, torch.enable_grad), (torch.enable_grad, torch.no_grad)):
        with together(layers):
            with first():
                layers[0](x)
            with then():
                assert layers[1](x).requires_grad == (then is torch.enable_grad)


def test_an_inference_tensor_has_no_version():
    layers = three(dtype=torch.float32)
    with torch.inference_mode():
        x = torch.randn(M, K)
    frozen = [layer.requires_grad_(False) for layer in layers]
    with together(frozen):
        assert torch.equal(frozen[0](x), frozen[0](x))


@pytest.mark.parametrize(
    "delta, keep, as_one",
    [
        (LORA, Quantized(8, 8), True),
        (Trained(), Quantized(4, 8), True),
        (LORA, Sampled(0.5, min_rows=2), True),  # one sample for all
        (DoRA(r=4, dtype=None), Sampled(0.5, min_rows=2), True),
        (LORA, Sampled(1.0, at="backward"), True),  # all rows
        (Trained(), Sampled(0.5, min_rows=2, at="backward"), False),  # rows of its own
        (LoRA(r=4, dtype=None, lora_dropout=0.5), Exact(), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_what_draws_draws_as_it_does_alone(delta, keep, as_one, frozen):
    """And so does whoever draws next. One that keeps nothing takes a seed, too, and another keeps with its own."""
    layers, (x, _) = three(delta=delta, keep=keep), inputs()
    if frozen is not None:
        layers[frozen].requires_grad_(False)
    dys, found = slopes(layers), []
    for group in (together, lambda layers: contextlib.nullcontext()):
        torch.manual_seed(7)
        at = x.clone().requires_grad_()
        with group(layers):
            ys = [layer(at) for layer in layers]
        if group is together:
            nodes = len({y.grad_fn for y in ys})
            assert nodes == (1 if as_one else 3) if frozen is None else nodes >= 2
        found.append([*ys, *torch.autograd.grad(ys, [at, *trained(layers)], dys), torch.rand(3)])
    assert torch.equal(found[0].pop(), found[1].pop())
    for got, alone in zip(*found, strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-10, atol=1e-12)


def test_among_layers_that_draw_the_others_work_as_one():
    layers, (x, _) = [*three(), made(Dense(), LORA, Sampled(0.5, min_rows=2))], inputs()
    x.requires_grad_()
    with together(layers):
        ys = [layer(x) for layer in layers]
    assert [y.grad_fn is ys[0].grad_fn for y in ys] == [True, True, True, False]


@pytest.mark.parametrize("kind", ["pre", "forward", "backward", "instance"])
def test_who_is_watched_computes_alone(kind):
    layers, (x, _) = three(), inputs()
    x.requires_grad_()
    seen = []
    if kind == "pre":
        layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    elif kind == "forward":
        layers[1].register_forward_hook(lambda module, args, y: seen.append(args[0]))
    elif kind == "backward":
        layers[1].register_full_backward_hook(lambda module, dx, dy: seen.append(dy))
    else:
        layers[1].forward = lambda x: 2 * Linear.forward(layers[1], x)
    right = [layer(x) for layer in layers]
    with together(layers):
        ys = [layer(x) for layer in layers]
    assert ys[0].grad_fn is ys[2].grad_fn is not ys[1].grad_fn
    for got, alone in zip(ys, right, strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-10, atol=1e-12)


def test_weights_that_are_others_for_the_time_of_a_call():
    """As a zeroth-order recipe perturbs them, by hooks of each layer, which address and version do not show."""
    layers, (x, _) = three(), inputs()
    x.requires_grad_()

    def enter(module, args):
        module.clean, module.weight.data = module.weight.data, module.weight.data + 1

    def leave(module, args, y):
        module.weight.data = module.clean

    for layer in layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    right = [layer(x) for layer in layers]
    with together(layers):
        assert all(torch.equal(layer(x), y) for layer, y in zip(layers, right, strict=True))


def test_a_weight_that_was_unfrozen_by_hand_is_refused_by_its_own_layer():
    layers, (x, _) = three(), inputs()
    layers[1].weight.requires_grad_()
    with together(layers):
        layers[0](x)
        with pytest.raises(RuntimeError, match="does not train the weight that it adds to"):
            layers[1](x)


def test_another_dtype_is_refused_by_its_own_layer():
    layers, (x, _) = three(), inputs()
    layers[1].float()
    with together(layers):
        layers[0](x)
        with pytest.raises(TypeError, match="cast one of them"):
            layers[1](x)
