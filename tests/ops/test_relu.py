"""relu and its derivative in bits: exact on every backend, for NaN, zeros and lengths that fill no byte."""

import pytest
import torch

from efftune.ops.relu import relu, relu_backward
from tests.ops.backends import BACKENDS, on

RUNS = [b for b in BACKENDS if b.values[0][0] != "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 331), (2, 5, 1640)])
def test_exact(backend, dtype, shape):
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, -1e-7]).to(dtype)
    if x.numel() > 7:
        x.view(-1)[3:10], dy.view(-1)[20] = special, torch.nan
    y, bits = on(backend, relu, x)
    leaf = x.clone().requires_grad_()
    expected = torch.relu(leaf)
    expected.backward(dy)
    assert y.dtype == dtype and bits.shape == ((x.numel() + 7) // 8,) and bits.dtype == torch.uint8
    expected = expected.detach()
    assert torch.equal(y.nan_to_num(9.0), expected.nan_to_num(9.0))
    assert torch.equal(y.signbit()[~y.isnan()], expected.signbit()[~expected.isnan()])  # of zeros
    dx = on(backend, relu_backward, dy, bits)
    assert torch.equal(dx.nan_to_num(9.0), leaf.grad.nan_to_num(9.0))


def test_bits_are_where_the_contract_says():
    x = torch.tensor([[1.0, -1.0, 2.0, 0.0, -3.0, -4.0, 5.0, -6.0, -1.0, 7.0]])
    assert relu(x)[1].tolist() == [1 + 4 + 64, 2]
    assert torch.equal(relu(x.t())[1], relu(x.t().contiguous())[1])


def test_refusals():
    with pytest.raises(ValueError, match="relu takes float64"):
        relu(torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"its bits \(2,\) in uint8, not"):
        relu_backward(torch.ones(9), torch.ones(1, dtype=torch.uint8))
