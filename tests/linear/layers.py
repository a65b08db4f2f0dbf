"""A plain layer, what goes through it, and what comes back."""

import torch
from torch import nn

from efftune.linear.delta.lora import DROPOUT_STREAM
from efftune.ops.dropout import dropout

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
