"""What a step of a layer that trains a few entries or columns in place allocates: nothing as large as the weight."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from efftune import Linear
from efftune.linear import Exact, NoDelta
from efftune.linear.delta.columns import Columns
from efftune.linear.delta.entries import Entries
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled
from efftune.memory.meter import allocated
from efftune.nn.norm import rms_norm
from efftune.ops import entries_grad

M, K, N = 12, 600, 512  # M·K and M·N are a fortieth of N·K
KEEPS = Exact(), Quantized(8, 32), Sampled(0.5, min_rows=4), Sampled(0.5, min_rows=4, at="backward")


@dataclass(frozen=True)
class DenseGradient(Entries):
    """The same, through the gradient of the whole weight."""

    def backward(self, c, dy, saved, add=None):
        dx = c.linear_t(dy, add=add) if c.need.x else add
        dvalues = c.weight_grad(dy, saved).flatten()[c.p[0]].to(c.p[2].dtype)
        return dx, c.no_dw(), (None, None, dvalues, None, None, None)


def layer(delta, dtype, keep=None, n=N, k=K):
    return Linear.from_linear(nn.Linear(k, n, dtype=dtype).requires_grad_(False), delta=delta, keep=keep or Exact())


def step_of(delta, dtype, keep, handle):
    """A step, which reads the weight as it was, too, and leaves nothing behind."""
    own, gain = layer(delta, dtype, keep), torch.ones(K, dtype=dtype)
    optimizer = torch.optim.AdamW([own.values], lr=1e-3, fused=True)
    x, dy = torch.randn(M, K, dtype=dtype, requires_grad=True), torch.randn(M, N, dtype=dtype)

    def step():
        own(rms_norm(x, gain) if handle else x).backward(dy)
        assert own.values.grad.any()
        optimizer.step()
        own.take_back()
        own.state_dict()
        x.grad = own.values.grad = None

    step()  # so that the optimizer has its state
    return step


def most(delta, dtype, keeps=KEEPS):
    """The most that a step allocates beside what there was, in bytes an entry of W, whatever the keep."""
    steps = [step_of(delta, dtype, keep, handle) for keep in keeps for handle in (False, True)]
    return allocated(lambda: [step() for step in steps])[1] / (N * K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta", [Entries(0.01), Columns(K // 50)], ids=str)
def test_all_of_a_step_is_less_than_a_byte_for_each_entry_of_the_weight(delta, dtype):
    """So that there is no tensor of N·K elements in it, of whatever dtype; the meter sees all that torch allocates."""
    assert most(delta, dtype) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_the_product_are_less_than_half_of_it(dtype, monkeypatch):
    """Where many entries are taken out of tiles, as above a density that depends on the machine; here of as few."""
    dense = most(DenseGradient(0.01), dtype, KEEPS[:1])
    assert dense > dtype.itemsize  # the test can fail
    monkeypatch.setattr(entries_grad, "TRANSPOSED", {dtype: 1e9})
    assert most(Entries(0.01), dtype) < dtype.itemsize / 2


@pytest.mark.parametrize("dtype, m", [(torch.float32, 512), (torch.bfloat16, 96)])  # few, where bfloat16 is emulated
def test_the_peak_is_that_of_a_frozen_layer_and_a_block(dtype, m):
    n, k = 1024, 1024
    x, dy = torch.randn(m, k, dtype=dtype, requires_grad=True), torch.randn(m, n, dtype=dtype)
    peaks = []
    for delta in (NoDelta(), Entries(0.01)):
        own = layer(delta, dtype, n=n, k=k)
        peaks.append(allocated(lambda own=own: own(x).backward(dy))[1])
        x.grad = None
    block, gradient = (n + k) * min(m, entries_grad.BLOCK) * dtype.itemsize, 4 * round(0.01 * n * k)
    assert peaks[1] <= peaks[0] + gradient + min(block, n * k * dtype.itemsize // 2)
    assert peaks[1] >= peaks[0] + 0.4 * block  # the meter sees it
