"""Activations with a kink, kept as codes: their gradients have no bias where the docstring of `glu` says so."""

import pytest
import torch

import efftune
from efftune.linear import Exact, Linear
from efftune.linear.keep.quantized import Quantized
from efftune.measure.fidelity import fidelity
from efftune.memory import meter
from efftune.nn.glu import Activation, glu

DRAWS = 400


def gradients(activation, gated, keep, dtype=torch.float32):
    """y, dgate and dup (M, F), for the same numbers each time."""
    g = torch.Generator().manual_seed(0)
    gate, up, dy = (torch.randn(16, 64, generator=g).to(dtype) for _ in range(3))
    gate[:, ::7] *= 1e-2  # near the kink
    leaves = [t.requires_grad_() for t in ((gate, up) if gated else (gate,))]
    y = glu(gate, up if gated else None, activation, keep)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def score(draws, exact, i):
    """z of the bias of the i-th gradient."""
    errors = torch.stack([(d[i] - exact[i]).flatten() for d in draws]).double()
    found = fidelity("", errors, exact[i].flatten().double(), errors, 0)
    assert found.error > 1e-4  # it is an estimate
    return found.z


def test_a_mask_from_codes_would_be_found_to_be_biased():
    gate = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    draws = [((Quantized(4).hold(gate, torch.tensor(i)).load() > 0).float(),) for i in range(DRAWS)]
    assert score(draws, ((gate > 0).float(),), 0) > 6


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("activation", "gated", "which"), [("relu", True, (1, 2)), ("relu2", False, (1,)), ("relu2", True, (1,))]
)
def test_no_bias_at_a_kink(activation, gated, which, bits):
    exact = gradients(activation, gated, Exact())
    torch.manual_seed(1)
    draws = [gradients(activation, gated, Quantized(bits)) for _ in range(DRAWS)]
    for i in which:
        assert abs(score(draws, exact, i)) < 4
        assert not torch.stack([d[i] for d in draws])[:, exact[i] == 0].any()  # what is clipped stays so


@pytest.mark.parametrize("keep", [Exact(), Quantized(8), Quantized(4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_alone_is_exact_and_keeps_a_bit(keep, dtype):
    torch.manual_seed(0)
    x = torch.randn(16, 64).to(dtype).requires_grad_()
    with meter.saved(Activation("relu", keep)) as kept:
        y = glu(x, None, "relu", keep)
    assert kept.total == 16 * 64 // 8
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(x.relu(), x, dy)[0]
    assert torch.equal(y, x.relu()) and torch.equal(torch.autograd.grad(y, x, dy)[0], expected)


def test_bytes_of_an_mlp_with_relu():
    """The layer behind relu keeps codes of relu's output, so that its weight's gradient has no bias either."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    tuner = efftune.apply(net, "full + mesa(bits=8)")
    assert isinstance(net[1], Activation) and isinstance(net[2], Linear)
    x, dy = torch.randn(32, 64), torch.randn(32, 64)
    with meter.saved(net) as kept:
        y = net(x)
    assert kept.total == 32 * (64 + 4) + 32 * 128 // 8 + 32 * (128 + 8) + 2 * 8  # codes, bits, seeds
    assert y.shape == dy.shape

    def grads():
        return torch.autograd.grad(net(x), [net[0].bias, net[2].weight], dy)

    with tuner.exactly():
        exact = grads()
    draws = [grads() for _ in range(DRAWS)]
    assert all(torch.equal(d[0], exact[0]) for d in draws)  # the gradient of relu's input
    assert abs(score(draws, exact, 1)) < 4
