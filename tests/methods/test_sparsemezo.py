import torch
from torch import nn

import efftune
from efftune.optim.zeroth_order import ZerothOrderSGD
from tests.methods.models import batch, llama, loss_fn


def test_sparse_leaves_large_weights_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40, bias=False))
    tuner = efftune.apply(model, "sparsemezo(sparsity=0.7)")
    optimizer = tuner.optimizer(lr=1e-3)
    before = model[0].weight.detach().clone()
    limit = before.abs().flatten().kthvalue(480).values
    for step in range(3):
        tuner.backward(
            torch.randn(2, 40, generator=torch.Generator().manual_seed(step)), lambda m, x: m(x).square().sum()
        )
        optimizer.step()
    moved = model[0].weight.detach() != before
    assert torch.equal(moved & (before.abs() > limit), torch.zeros_like(moved)) and moved.sum() > 470


def test_a_tensor_that_begins_at_zero_trains_whole():
    tuner = efftune.apply(llama(), "lora(r=4) + sparsemezo(sparsity=0.5)")
    optimizer = tuner.optimizer(lr=1e-2)
    name, b = next((n, p) for n, p in tuner.named_trained().items() if "lora_b" in n)
    for step in range(3):
        before = b.detach().clone()
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        optimizer.step()
        assert (b != before).all(), name


def test_many_zeros_do_not_make_a_tensor_train_whole():
    """Nor leave it only its zeros: the threshold is then that of the other entries."""
    w = nn.Parameter(torch.cat([torch.zeros(40), torch.arange(1.0, 61.0)])[torch.randperm(100)])
    optimizer = ZerothOrderSGD([("w", w)], sparsity=0.75)
    assert optimizer.directions.threshold("w", w) == 15.0
    moved = optimizer.directions.perturbed(["w"], [w.data], 0.1, 3)[0] != w.data
    assert torch.equal(moved, w.data.abs() <= 15)
