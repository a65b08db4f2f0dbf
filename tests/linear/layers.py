"""A plain layer, what goes through it, and what comes back."""

import copy

import torch
from torch import nn

from efftune.linear.delta.lora import DROPOUT_STREAM
from efftune.ops.dropout import dropout
from tests.budget import assert_within_budget, rms

M, K, N = 40, 64, 48


def plain(bias=True, dtype=torch.float32, n=N, k=K):
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(False)


def inputs(dtype=torch.float32, m=M, k=K, n=N):
    g = torch.Generator().manual_seed(1)
    return torch.randn(m, k, generator=g).to(dtype), torch.randn(m, n, generator=g).to(dtype)


class Mask(nn.Module):
    """PEFT's dropout with the mask that a seed of this library draws."""

    def __init__(self, p, seed):
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x):
        ones = torch.ones(x.shape[-2:], dtype=torch.float64)
        return x * dropout(ones, self.p, self.seed, DROPOUT_STREAM).to(x.dtype)


def gradients(made, parameters, x, dy):
    x = x.detach().clone().requires_grad_()
    y = made(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]


def assert_as_peft(ours, in_peft, dtype):
    """Outputs and gradients of `ours` against those of PEFT's layer, which `in_peft(dtype)` gives with its parameters:
    in float64 to its last digits; in `dtype` no further from that than PEFT is in the same dtype."""
    for name in ours.delta.names:  # numbers that every dtype has
        p = getattr(ours, name)
        p.data = p.data.to(dtype)
    x, dy = inputs(dtype)
    found = gradients(ours, ours.added(), x, dy)
    theirs, parameters = in_peft(torch.float64)
    exact = gradients(theirs, parameters, x.double(), dy.double())
    double = copy.deepcopy(ours).double()
    for got, right in zip(gradients(double, double.added(), x.double(), dy.double()), exact, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)
    theirs, parameters = in_peft(dtype)
    for got, their, right in zip(found, gradients(theirs, parameters, x, dy), exact, strict=True):
        assert got.dtype == dtype
        if dtype == torch.float32:
            assert_within_budget(got, right, their)
        else:
            assert rms(got.double() - right) <= 1.2 * rms(their.double() - right)
