"""Layers that work as one, and the same layers one by one, with what is held against each other."""

import contextlib

import torch

from efftune.linear import Dense, Int8, LoRA
from efftune.linear.group import Group
from tests.linear.test_contracts import M, expected, made

LORA = LoRA(r=4, lora_alpha=6, dtype=None)


@contextlib.contextmanager
def together(layers):
    """As a module around the layers does while it runs."""
    group = Group(layers)
    for layer in layers:
        layer.group = group
    try:
        yield group
    finally:
        for layer in layers:
            del layer.group


def three(base=None, delta=LORA, keep=None, **settings):
    """Layers of different weights and of one kind."""
    layers = [made(base or Dense(), delta, keep, **settings) for _ in range(3)]
    for i, layer in enumerate(layers):
        torch.manual_seed(10 + i)
        for name in (*layer.base.learns, *layer.delta.names, "bias"):
            t = layer._parameters.get(name)
            if t is not None and not (isinstance(layer.base, Int8) and name == "scales"):
                t.data += 0.1 * torch.randn_like(t)
    return layers


def slopes(layers, m=M):
    torch.manual_seed(3)
    return [torch.randn(m, layer.out_features, dtype=layer.stored().dtype) for layer in layers]


def trained(layers):
    return [p for layer in layers for p in layer.parameters() if p.requires_grad]


def as_one(layers, x, dys, order=None):
    """ys, dx and gradients where the layers work as one, which is checked."""
    x = x.clone().requires_grad_()
    with together(layers) as group:
        ys = {i: layers[i](x) for i in order or range(len(layers))}
    assert len({y.grad_fn for y in ys.values()}) == 1 and not group.results and group.x is None
    ys = [ys[i] for i in range(len(layers))]
    return [y.detach() for y in ys], *torch.autograd.grad(ys, [x, *trained(layers)], dys)


def one_by_one(layers, x, dys):
    x = x.clone().requires_grad_()
    ys = [layer(x) for layer in layers]
    assert len({y.grad_fn for y in ys}) == len(layers)
    return [y.detach() for y in ys], *torch.autograd.grad(ys, [x, *trained(layers)], dys)


def assert_formula(layers, x, dys, found):
    rights = [expected(layer, x, dy) for layer, dy in zip(layers, dys, strict=True)]
    right = [sum(dx for _, dx, _ in rights), *(g for _, _, grads in rights for g in grads)]
    for got, right_one in zip((*found[0], *found[1:]), (*(y for y, _, _ in rights), *right), strict=True):
        torch.testing.assert_close(got, right_one, rtol=1e-10, atol=1e-12)


def flat(found):
    return *found[0], *found[1:]
