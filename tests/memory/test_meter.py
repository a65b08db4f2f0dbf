"""The meter: once per storage, parameters apart, by module, and nothing left behind."""

import pytest
import torch
from torch import nn

from efftune import EfftuneError
from efftune.memory import meter


def test_once_per_storage_by_module_and_parameters_apart():
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    x = torch.randn(5, 8)
    kept = meter.saved_for_backward(net, lambda: net(x).sum())
    # x for the first weight; tanh keeps its output, which the last layer reads: one storage, seen first in Tanh
    assert kept.by_module == {"0": 5 * 8 * 4, "1": 5 * 16 * 4}
    assert kept.owned == 16 * 4 * 4 and kept.total == 5 * 24 * 4
    assert kept.by_kind(net) == {"Tanh": (1, 320), "Linear": (1, 160)}


def test_it_leaves_nothing_behind_even_if_the_forward_fails():
    class Fails(nn.Module):
        def forward(self, x):
            raise ArithmeticError

    net = nn.Sequential(nn.Linear(2, 2), Fails())
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            meter.saved_for_backward(net, lambda: net(torch.ones(1, 2)))
    linear = net[0]
    kept = meter.saved_for_backward(linear, lambda: linear(torch.ones(3, 2)).sum())
    assert kept.by_module == {"": 24}


def test_a_loss_without_gradient_is_refused():
    net = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(EfftuneError, match="nothing is saved"):
        meter.saved_for_backward(net, lambda: net(torch.ones(1, 2)).sum())


def test_allocated():
    made = []
    live, peak = meter.allocated(lambda: made.append(torch.ones(1000) + torch.ones(1000)))
    assert live == 4000 and peak == 12000
