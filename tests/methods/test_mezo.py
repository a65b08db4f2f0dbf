import pytest
import torch
from torch import nn

import efftune
from efftune.methods.zeroth_order.mezo import perturbed
from efftune.ops.perturb import perturb
from efftune.optim.zeroth_order import ZerothOrderSGD, stream_of
from tests.methods.models import Perceptron, batch, llama, loss_fn


def test_weights_are_restored_bit_for_bit_and_seen_perturbed():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    tuner = efftune.apply(model, "mezo")
    optimizer = tuner.optimizer(lr=1.0)
    before = [p.clone() for p in model.parameters()]
    x = torch.randn(5, 4)
    with perturbed(model, optimizer, 0.5, seed=3, dist="normal") as seen:
        y = model(x)
    assert len(seen) == 4
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    w = {n: perturb(p.data, 0.5, seed=3, stream=stream_of(n)) for n, p in model.named_parameters()}
    assert torch.equal(y, torch.func.functional_call(model, w, (x,)))


def test_an_exception_in_forward_restores_the_weights():
    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("in forward")

    model = nn.Sequential(nn.Linear(4, 3), Fails(3, 2))
    tuner = efftune.apply(model, "mezo")
    tuner.optimizer(lr=1.0)
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="in forward"):
        tuner.backward(torch.randn(2, 4), lambda m, x: m(x).sum())
    assert [p.data_ptr() for p in model.parameters()] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_learning_rate_zero_leaves_every_bit(dtype):
    model = llama(dtype=torch.bfloat16 if dtype == torch.float16 else dtype).to(dtype)
    tuner = efftune.apply(model, "mezo")
    optimizer = tuner.optimizer(lr=0.0)
    before = [p.clone() for p in model.parameters()]
    for _ in range(5):
        tuner.backward(batch(), loss_fn)
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_exact_directional_derivative_on_a_quadratic():
    """L = |θ|²/2: (L(θ+εz) − L(θ−εz)) / 2ε = θ·z without error in ε, so the update is −lr (θ·z) z."""

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.linspace(-1, 1, 64, dtype=torch.float64))

        def forward(self, _):
            return self.theta.square().sum() / 2

    model = Quadratic()
    theta = model.theta.detach().clone()
    tuner = efftune.apply(model, "mezo(eps=0.1)")
    optimizer = tuner.optimizer(lr=0.01)
    tuner.backward(None, lambda m, b: m(b))
    ((seed, a, _),) = optimizer.pending
    z = perturb(torch.zeros_like(theta), 1.0, seed=seed, stream=stream_of("theta"))
    torch.testing.assert_close(a, float(theta @ z))
    optimizer.step()
    torch.testing.assert_close(model.theta.detach(), theta - 0.01 * a * z)


def test_the_estimate_is_unbiased():
    """Mean of a·z over seeds against the gradient, Bonferroni-bounded; and E|ĝ|² = (d + 2)|g|² within its error."""
    torch.manual_seed(0)
    model = Perceptron().double()
    x, target = torch.randn(16, 8, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)

    def loss(m, _):
        return (m(x) - target).square().mean()

    loss(model, None).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    tuner = efftune.apply(model, "mezo(eps=1e-4)")
    optimizer = tuner.optimizer(lr=0.0)
    names = [n for n, _ in model.named_parameters()]
    estimates = []
    for step in range(1500):
        tuner.step = step
        tuner.backward(None, loss)
        ((seed, a, _),) = optimizer.pending
        optimizer.pending.clear()
        zs = [perturb(torch.zeros_like(model.get_parameter(n)), 1.0, seed=seed, stream=stream_of(n)) for n in names]
        estimates.append(a * torch.cat([z.flatten() for z in zs]))
    stack = torch.stack(estimates)
    z_score = (stack.mean(0) - gradient) / (stack.std(0) / len(stack) ** 0.5)
    assert z_score.abs().max() < 4.7  # 216 entries, p < 1e-3 in all
    squares = stack.square().sum(1)
    expected = (len(gradient) + 2) * gradient.square().sum()
    assert (squares.mean() - expected).abs() < 4 * squares.std() / len(squares) ** 0.5


def test_updates_below_the_last_place_are_not_lost_in_bfloat16():
    weight = nn.Parameter(torch.full((4096,), 0.02, dtype=torch.bfloat16))
    optimizer = ZerothOrderSGD([("w", weight)], lr=1e-6)
    for seed in range(64):
        optimizer.accumulate(seed, 1.0, {id(weight)})
        optimizer.step()
    moved = (weight.double() - 0.02).std()
    assert 0.2 * 8e-6 < moved < 5 * 3e-4  # rounding to nearest would leave every weight where it was
    assert (weight.double() - torch.tensor(0.02).bfloat16().double()).mean().abs() < 5 * moved / 64


def test_a_parameter_that_no_forward_uses_is_reported():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.used = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.linear(self.used(x), self.inner.weight).sum()

    model = Direct()
    tuner = efftune.apply(model, "mezo")
    optimizer = tuner.optimizer(lr=1e-3)
    before = model.inner.weight.clone()
    with pytest.warns(UserWarning, match="inner.weight"):
        tuner.backward(torch.randn(2, 3), lambda m, x: m(x))
    optimizer.step()
    assert torch.equal(model.inner.weight, before)


def test_loss_backward_is_refused():
    """As Hugging Face's Trainer would: gradients that nobody applies must not pass in silence."""
    tuner = efftune.apply(Perceptron(), "mezo")
    optimizer = tuner.optimizer(lr=0.1)
    tuner.model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(efftune.EfftuneError, match="tuner.backward"):
        optimizer.step()


def test_modes_are_restored_each_in_its_own_even_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    tuner = efftune.apply(model, "mezo")
    tuner.optimizer(lr=0.1)
    model.train()
    model[1].eval()
    tuner.backward(torch.randn(3, 4), lambda m, x: m(x).sum())
    with pytest.raises(ZeroDivisionError):
        tuner.backward(torch.randn(3, 4), lambda m, x: 1 / 0)
    assert [m.training for m in model.modules()] == [True, True, False]


def test_another_optimizer_is_refused():
    tuner = efftune.apply(Perceptron(), "mezo")
    tuner.attach(torch.optim.SGD(tuner.param_groups(), lr=0.1))
    with pytest.raises(efftune.EfftuneError, match="tuner.optimizer"):
        tuner.backward(torch.randn(2, 8), lambda m, x: m(x).sum())
    with pytest.raises(efftune.EfftuneError, match="name, parameter"):
        ZerothOrderSGD([nn.Parameter(torch.zeros(2))])
