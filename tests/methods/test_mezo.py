import math

import pytest
import torch
from torch import nn

import efftune
from efftune.memory.meter import allocated
from efftune.methods.zeroth_order._estimate import half_place
from efftune.ops.perturb import perturb
from efftune.optim.directions import stream_of
from efftune.train.default_job import MODEL
from efftune.train.task import causal_lm_loss
from tests import children
from tests.methods.models import Perceptron, batch, llama, loss_fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_learning_rate_zero_leaves_every_bit(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
    tuner = efftune.apply(model, "mezo")
    optimizer = tuner.optimizer(lr=0.0)
    before = [p.clone() for p in model.parameters()]
    x = torch.randn(2, 24, dtype=dtype)
    for _ in range(1000):
        tuner.backward(x, lambda m, x: m(x).float().square().mean())
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
    ((seed, (a, _)),) = optimizer.scalars.pending.items()
    z = perturb(torch.zeros_like(theta), 1.0, seed=seed, stream=stream_of("theta"))
    torch.testing.assert_close(float(a), float(theta @ z))
    optimizer.step()
    torch.testing.assert_close(model.theta.detach(), theta - 0.01 * a * z, rtol=1e-6, atol=1e-9)  # a is float32 there


def test_the_estimate_is_unbiased():
    """Mean of a·z over seeds against the gradient, Bonferroni-bounded; and E|ĝ|² = (d + 2)|g|² within its error."""
    torch.manual_seed(0)
    model = Perceptron()  # six tensors, which must not share their draws
    x, target = torch.randn(16, 8), torch.randn(16, 8)

    def loss(m, _):
        return (m(x) - target).square().mean()

    loss(model, None).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    tuner = efftune.apply(model, "mezo(eps=1e-3)")  # in float32, whose draws C++ makes, with 1e-4 of rounding
    optimizer = tuner.optimizer(lr=0.0)
    names = [n for n, _ in model.named_parameters()]
    estimates = []
    for step in range(1500):
        tuner.step = step
        tuner.backward(None, loss)
        ((seed, (a, _)),) = optimizer.scalars.pending.items()
        optimizer.scalars.pending.clear()
        zs = [perturb(torch.zeros_like(model.get_parameter(n)), 1.0, seed=seed, stream=stream_of(n)) for n in names]
        estimates.append(a * torch.cat([z.flatten() for z in zs]))
    stack, gradient = torch.stack(estimates).double(), gradient.double()
    z_score = (stack.mean(0) - gradient) / (stack.std(0) / len(stack) ** 0.5)
    assert z_score.abs().max() < 4.7  # 216 entries, p < 1e-3 in all
    squares = stack.square().sum(1)
    expected = (len(gradient) + 2) * gradient.square().sum()
    assert (squares.mean() - expected).abs() < 4 * squares.std() / len(squares) ** 0.5


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


class Smooth(nn.Module):
    """L(θ) = Σ sin(θ_i + i): its third derivative does not vanish."""

    def __init__(self, n=8):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64))

    def forward(self, _):
        return (self.theta + torch.arange(len(self.theta))).sin().sum()


def scalar(tuner, optimizer, loss=lambda m, b: m(b)):
    tuner.backward(None, loss)
    ((seed, (a, _)),) = optimizer.scalars.pending.items()
    optimizer.scalars.pending.clear()
    return seed, float(a)


def test_the_error_of_the_scalar_falls_with_the_square_of_eps():
    errors = []
    for eps in (0.2, 0.1, 0.05):
        model = Smooth()
        tuner = efftune.apply(model, f"mezo(eps={eps})")
        seed, a = scalar(tuner, tuner.optimizer(lr=0.0))
        z = perturb(torch.zeros_like(model.theta), 1.0, seed=seed, stream=stream_of("theta"))
        gradient = (model.theta.detach() + torch.arange(8)).cos()
        errors.append(abs(a - float(gradient @ z)))
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.8 < errors[1] / errors[2] < 4.2


def test_samples_are_averaged_and_one_point_is_unbiased():
    """samples=k: variance / k. points=1: the mean over steps of a·z is the gradient, at a larger variance."""
    gradient = (Smooth().theta.detach() + torch.arange(8)).cos()

    def estimates(recipe, steps):
        model = Smooth().float()  # whose draws C++ makes
        tuner = efftune.apply(model, recipe)
        optimizer = tuner.optimizer(lr=1.0)
        before, found = model.theta.detach().clone(), []
        for step in range(steps):
            tuner.step = step
            tuner.backward(None, lambda m, b: m(b))
            optimizer.step()
            found.append(before - model.theta.detach())
            model.theta.data.copy_(before)
        return torch.stack(found).double()

    variance = {}
    for recipe in ("mezo(eps=1e-3)", "mezo(eps=1e-3, samples=4)", "mezo(eps=1e-2, points=1)"):
        found = estimates(recipe, 800)
        if "points" in recipe:
            assert found[0].abs().max() == 0  # the first step only looks
            found = found[2:]
        z = (found.mean(0) - gradient) / (found.std(0) / len(found) ** 0.5)
        assert z.abs().max() < 4.2, recipe  # 24 entries
        variance[recipe] = float(found.var(0).sum())
    first, averaged, one = variance.values()
    assert 3 < first / averaged < 5.2 and one > first


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("signs", [(1,), (1, 2)])
def test_a_loss_that_is_not_finite_skips_the_direction_and_is_counted(bad, signs):
    model = nn.Sequential(nn.Linear(4, 4))
    tuner = efftune.apply(model, "mezo")
    optimizer = tuner.optimizer(lr=1.0)
    before, calls = [p.clone() for p in model.parameters()], [0]

    def loss(m, x):
        calls[0] += 1
        return m(x).square().sum() * (bad if calls[0] in signs else 1.0)

    shown = tuner.backward(torch.ones(2, 4), loss)
    optimizer.step()
    assert bool(shown.isfinite()) == (len(signs) == 1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert int(optimizer.scalars.skipped) == 1
    assert "mezo: 1 of 1 directions skipped, whose loss was not finite\n" in tuner.summary() + "\n"
    tuner.backward(torch.ones(2, 4), loss)
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0])


@pytest.mark.parametrize("points, losses, flat", [(2, (7, 7, 7, 7, 7, 8, 8, 8), "3 of 4"), (1, (7, 7, 8, 8), "2 of 4")])
def test_directions_that_tell_nothing_are_counted(points, losses, flat):
    """Of a metric that is constant almost everywhere. The first look of one point has nothing to differ from."""
    tuner = efftune.apply(nn.Sequential(nn.Linear(4, 4)), f"mezo(points={points})")
    optimizer, values = tuner.optimizer(lr=1.0), iter(losses)
    for _ in range(4):
        optimizer.zero_grad()
        tuner.backward(torch.ones(2, 4), lambda m, x: m(x).sum() * 0 + next(values))
        optimizer.step()
    assert f"mezo: {flat} directions had the same loss on both sides" in tuner.summary()


def test_a_perturbation_below_the_last_place_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    tuner = efftune.apply(model, "mezo(eps=1e-5)")
    tuner.optimizer(lr=1e-6)
    smallest = half_place(model[0].weight)
    assert 1e-4 < smallest < 1e-3  # weights of 0.07: a unit in the last place is 2^-11
    with pytest.warns(UserWarning, match=f"not lost is {smallest:.2g}"):
        tuner.backward(torch.randn(2, 64).bfloat16(), lambda m, x: m(x).float().square().sum())


def test_a_loss_without_a_gradient_trains():
    """Accuracy as the objective: a linear classifier from forward passes alone."""
    torch.manual_seed(0)
    x = torch.randn(400, 5)
    labels = (x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0]) > 0).long()
    model = nn.Linear(5, 2)
    model.weight.data.zero_()
    model.bias.data.copy_(torch.tensor([0.1, 0.0]))
    tuner = efftune.apply(nn.Sequential(model), "mezo(eps=0.1, samples=8)")
    optimizer = tuner.optimizer(lr=0.3)

    def wrong(m, _):
        return 1 - float((m(x).argmax(-1) == labels).float().mean())  # a Python number will do

    first = wrong(tuner.model, None)
    for _ in range(80):
        tuner.backward(None, wrong)
        optimizer.step()
    assert wrong(tuner.model, None) < 0.1 < 0.4 < first


def test_casts_of_an_autocast_around_the_step_are_of_the_weights_as_they_are():
    """Autocast keeps 16-bit casts by parameter, whose data change."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))

    def loss(m, x):
        return m(x).float().square().mean()

    def inside(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(m, x)

    found = []
    for around in (False, True):
        torch.manual_seed(0)
        tuner = efftune.apply(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), "mezo(eps=0.05)")
        optimizer = tuner.optimizer(lr=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            clean = loss(tuner.model, x) if around else inside(tuner.model, x)
            tuner.backward(x, loss if around else inside)
            again = loss(tuner.model, x) if around else inside(tuner.model, x)
        found.append(float(next(iter(optimizer.scalars.pending.values()))[0]))
        assert clean == again
    assert found[0] == found[1] != 0


def test_attributes_of_the_model_are_its_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.directions, self.differentiable = nn.ModuleList([nn.Linear(4, 4)]), True

        def forward(self, x):
            return self.directions[0](x) if self.differentiable else x

    model = Model()
    tuner = efftune.apply(model, "mezo")
    optimizer = tuner.optimizer(lr=0.1)
    for _ in range(2):
        tuner.backward(torch.ones(2, 4), lambda m, x: m(x).square().mean().reshape(1))
        optimizer.step()
    assert model.differentiable is True and isinstance(model.directions, nn.ModuleList)
    with pytest.raises(efftune.EfftuneError, match=r"returns one number, not a tensor of shape \(2, 4\)"):
        tuner.backward(torch.ones(2, 4), lambda m, x: m(x))


SHARED = ["mezo(samples=2)", "fedkseed(k=4, pro=True, interval=1, beta2=0.9)"]


def shared_run(recipe, rank, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.randn(8, 6, dtype=torch.float64).chunk(size)[rank]
    tuner = efftune.apply(model, recipe)
    optimizer = tuner.optimizer(lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        bad = float("nan") if step == 2 and rank == size - 1 else 1.0  # a loss that is not finite on one of them
        tuner.backward(data, lambda m, x, bad=bad: m(x).square().mean() * bad)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def worker(rank, path):
    import torch.distributed.nn.functional  # noqa: F401  # before the group that it would keep

    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    torch.save([shared_run(recipe, rank, 2) for recipe in SHARED], f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    assert children.wait([children.start(worker, rank, tmp_path) for rank in (0, 1)]) == [0, 0]
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for recipe, first, second in zip(SHARED, *two, strict=True):
        for p, q, r in zip(shared_run(recipe, 0, 1), first, second, strict=True):
            assert torch.equal(q, r)
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)  # the scalars are pinned to float32


@pytest.mark.parametrize(
    "recipe",
    ["mezo(points=1)", "fedkseed(k=2, samples=3, points=1)", "fedkseed(k=4, pro=True, unbiased=True, points=1)"],
)
@pytest.mark.parametrize("first", [1.0, math.nan])
def test_one_point_takes_differences_of_losses_only(recipe, first):
    """A loss of 1e4 that hardly changes: scalars of its size would mean that a baseline is missing somewhere."""
    torch.manual_seed(0)
    model = Perceptron()
    tuner = efftune.apply(model, recipe)
    optimizer, x, calls, told = tuner.optimizer(lr=0.0), torch.randn(4, 8), [0], False

    def loss(m, _):
        calls[0] += 1
        return (m(x).double().square().mean() + 1e4) * (first if calls[0] == 1 else 1.0)

    for step in range(9):
        optimizer.zero_grad()
        micro_batches = 1 + step % 3  # as at the end of an epoch
        for _ in range(micro_batches):
            tuner.backward(None, loss, scale=1 / micro_batches)
        found = torch.stack([a for a, _ in optimizer.scalars.pending.values()])
        assert (found[found.isfinite()].abs() < 1e4).all()  # 1e4 / eps would be 1e7
        told |= bool(
            (found[found.isfinite()] != 0).any()
        )  # not always: the same seed twice in a row differs by nothing
        optimizer.step()
    assert told


def test_with_momentum_frozen_layers_rest():
    tuner = efftune.apply(llama(), "full + lisa(layers=1, interval=1) + mezo(momentum=0.9)")
    optimizer = tuner.optimizer(lr=1e-3)
    for step in range(6):
        frozen = {n: p.detach().clone() for n, p in tuner.named_trained().items() if not p.requires_grad}
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        optimizer.step()
        now = tuner.named_trained()
        assert frozen and all(torch.equal(now[n], t) for n, t in frozen.items())


def test_an_interrupt_leaves_the_weights_clean():
    class Interrupted(nn.Linear):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 3), Interrupted(3, 2))
    tuner = efftune.apply(model, "mezo")
    tuner.optimizer(lr=1.0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        tuner.backward(torch.randn(2, 4), lambda m, x: m(x).sum())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "recipe, tie",
    [("mezo", False), *((r, True) for r in ("mezo", "mezo(momentum=0.9)", "sparsemezo", "lora(r=8) + mezo"))],
)
def test_a_step_takes_the_memory_of_inference_and_of_the_largest_layer(recipe, tie):
    """Over the default model in bfloat16: two forward passes, the largest layer's trained weights, and 1 %."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = torch.randint(0, MODEL["vocab_size"], (2, 64))
    data = {"input_ids": ids, "labels": ids}
    tuner = efftune.apply(
        LlamaForCausalLM(LlamaConfig(**MODEL | {"tie_word_embeddings": tie})).bfloat16().eval(), recipe
    )
    optimizer = tuner.optimizer(lr=1e-7)

    def step():
        tuner.backward(data, causal_lm_loss)
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        _, inference = allocated(lambda: float(causal_lm_loss(tuner.model, data) + causal_lm_loss(tuner.model, data)))
    step()
    _, peak = allocated(step)
    largest = max(
        sum(p.nbytes for p in module.parameters(recurse=False) if p.requires_grad) for module in tuner.model.modules()
    )
    assert peak <= 1.01 * (inference + largest)
