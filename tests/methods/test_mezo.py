import math

import pytest
import torch
from torch import nn

import efftune
from efftune.methods.zeroth_order._estimate import half_place, perturbed
from efftune.methods.zeroth_order.fedkseed import candidates, significance
from efftune.ops.perturb import perturb
from efftune.optim.seed_log import SeedLog, fingerprint
from efftune.optim.zeroth_order import ZerothOrderSGD, stream_of
from tests.methods.models import Perceptron, batch, llama, loss_fn


def test_weights_are_restored_bit_for_bit_and_seen_perturbed():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    tuner = efftune.apply(model, "mezo")
    optimizer = tuner.optimizer(lr=1.0)
    before = [p.clone() for p in model.parameters()]
    x = torch.randn(5, 4)
    with perturbed(model, optimizer, 0.5, seed=3) as used:
        y = model(x)
    assert len(used) == 4
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
    ((seed, (a, _)),) = optimizer.pending.items()
    z = perturb(torch.zeros_like(theta), 1.0, seed=seed, stream=stream_of("theta"))
    torch.testing.assert_close(float(a), float(theta @ z))
    optimizer.step()
    torch.testing.assert_close(model.theta.detach(), theta - 0.01 * a * z, rtol=1e-6, atol=1e-9)  # a is float32 there


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
        ((seed, (a, _)),) = optimizer.pending.items()
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


class Smooth(nn.Module):
    """L(θ) = Σ sin(θ_i + i): its third derivative does not vanish."""

    def __init__(self, n=8):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64))

    def forward(self, _):
        return (self.theta + torch.arange(len(self.theta))).sin().sum()


def scalar(tuner, optimizer, loss=lambda m, b: m(b)):
    tuner.backward(None, loss)
    ((seed, (a, _)),) = optimizer.pending.items()
    optimizer.pending.clear()
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
        model = Smooth()
        tuner = efftune.apply(model, recipe)
        optimizer = tuner.optimizer(lr=1.0)
        before, found = model.theta.detach().clone(), []
        for step in range(steps):
            tuner.step = step
            tuner.backward(None, lambda m, b: m(b))
            optimizer.step()
            found.append(before - model.theta.detach())
            model.theta.data.copy_(before)
        return torch.stack(found)

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


@pytest.mark.parametrize("update, dtype", [("stochastic", torch.bfloat16), ("exact", torch.float32)])
def test_the_mean_update_is_what_was_asked_for(update, dtype):
    """η·a = 1e-7 on 10 000 weights of 0.02, within 3 standard errors; to nearest in bfloat16 almost none would move."""
    w = torch.full((10_000,), 0.02, dtype=dtype)
    moved = torch.zeros(10_000, dtype=torch.float64)
    steps = 40
    for seed in range(steps):
        weight = nn.Parameter(w.clone())
        rounding = "stochastic" if update == "stochastic" else "nearest"
        optimizer = ZerothOrderSGD([("w", weight)], lr=1e-7, dist="rademacher", rounding=rounding)
        optimizer.accumulate(seed, 1.0, {id(weight)})
        optimizer.step()
        z = perturb(torch.zeros(10_000), 1.0, seed=seed, stream=stream_of("w"), dist="rademacher")
        moved += -(weight.detach().double() - w.double()) * z / steps
    error = moved.std() / 100
    assert (moved.mean() - 1e-7).abs() < (3 * error if update == "stochastic" else 1e-9)


def test_what_sixteen_bits_would_lose_is_refused():
    with pytest.raises(efftune.EfftuneError, match="Weight decay would be lost in 0.weight"):
        efftune.apply(nn.Sequential(nn.Linear(4, 4)).bfloat16(), "mezo").optimizer(lr=1e-6, weight_decay=0.1)
    with pytest.raises(efftune.EfftuneError, match="would lose most updates of 0.weight"):
        efftune.apply(nn.Sequential(nn.Linear(4, 4)).bfloat16(), "mezo(update='exact')").optimizer(lr=1e-6)


VARIANTS = [
    "mezo", "mezo(dist='rademacher', momentum=0.5)", "mezo(beta2=0.9, samples=2)", "mezo(points=1)",
    "fedkseed(k=3, points=1, samples=3)", "full + lisa(layers=1, interval=2) + mezo(momentum=0.9)",
    "lora(r=4) + sparsemezo",
    "sparsemezo(sparsity=0.6)", "lora(r=4) + mezo(momentum=0.8)", "lora(r=4) + lisa(layers=1, interval=2) + mezo",
]  # fmt: skip


def trained(recipe, steps=6, dtype=torch.float32, lr=1e-3, weight_decay=0.0, resume_at=None):
    tuner = efftune.apply(llama(dtype=dtype), recipe)
    optimizer = tuner.optimizer(lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        if step == resume_at:  # into a new optimizer, as a resumed run does
            state = optimizer.state_dict()
            optimizer = tuner.optimizer(lr=lr, weight_decay=weight_decay)
            optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] = lr / (1 + step)
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        optimizer.step()
    return tuner, optimizer


@pytest.mark.parametrize("recipe", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_log_replays_to_the_same_bits(recipe, dtype, tmp_path):
    tuner, optimizer = trained(recipe, dtype=dtype, weight_decay=0.1 if dtype == torch.float32 else 0.0)
    optimizer.log.save(tmp_path / "log", {"note": 1})
    log, about = SeedLog.load(tmp_path / "log")
    assert about["note"] == 1 and about["count"] == len(log.entries) > 0
    again = efftune.apply(llama(dtype=dtype), recipe)  # llama() sets the seed: LoRA's first draws are the same
    before = [p.detach().clone() for p in again.named_trained().values()]
    again.optimizer(lr=0.0).replay(log)
    for (name, p), q in zip(tuner.named_trained().items(), again.named_trained().values(), strict=True):
        assert torch.equal(p, q), name
    assert any(not torch.equal(p, b) for p, b in zip(again.named_trained().values(), before, strict=True))


@pytest.mark.parametrize("recipe", VARIANTS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(recipe):
    whole, first = trained(recipe)
    parts, second = trained(recipe, resume_at=3)
    for p, q in zip(whole.named_trained().values(), parts.named_trained().values(), strict=True):
        assert torch.equal(p, q)
    assert first.log.fetch().tobytes() == second.log.fetch().tobytes()


def test_a_log_is_small_may_be_cut_and_knows_what_it_is(tmp_path):
    log = SeedLog()
    for step in range(10_000):
        log.append(step, 1000 + step, torch.tensor(step / 7), 0, [])
    path = tmp_path / "log"
    log.save(path, {"recipe": "mezo"})
    assert path.stat().st_size <= 170_000
    again, _ = SeedLog.load(path)
    assert again.entries.tobytes() == log.entries.tobytes()
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    cut, about = SeedLog.load(path)
    assert len(cut.entries) == 10_000 - 63 and about["count"] == 10_000
    assert cut.entries.tobytes() == log.entries[: len(cut.entries)].tobytes()
    for broken in (b"", data[:50], b"{}" * 40, data.replace(b"efftune-seed-log-1", b"efftune-seed-log-9")):
        path.write_bytes(broken)
        with pytest.raises(efftune.EfftuneError, match="no seed log"):
            SeedLog.load(path)
    with pytest.raises(efftune.EfftuneError, match="cannot be read"):
        SeedLog.load(tmp_path / "nowhere")


def test_a_fingerprint_sees_every_change():
    model = llama(dtype=torch.bfloat16)
    first = fingerprint(model)
    assert first == fingerprint(llama(dtype=torch.bfloat16)) != fingerprint(llama(dtype=torch.float32))
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[[3, 4]] = weight[[4, 3]]
    swapped = fingerprint(model)
    weight[[3, 4]] = weight[[4, 3]]
    assert swapped != first == fingerprint(model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("signs", [(1,), (1, 2)])
def test_a_loss_that_is_not_finite_skips_the_direction_and_is_counted(bad, signs):
    model = nn.Sequential(nn.Linear(4, 4))
    tuner = efftune.apply(model, "mezo")
    optimizer = tuner.optimizer(lr=1.0)
    before, calls = [p.clone() for p in model.parameters()], [0]

    def loss(m, x):
        calls[0] += 1
        return m(x).sum() * (bad if calls[0] in signs else 1.0)

    shown = tuner.backward(torch.ones(2, 4), loss)
    optimizer.step()
    assert bool(shown.isfinite()) == (len(signs) == 1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert int(optimizer.skipped) == 1
    assert "1 direction skipped" in tuner.summary()
    tuner.backward(torch.ones(2, 4), loss)
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0])


def test_a_perturbation_below_the_last_place_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    tuner = efftune.apply(model, "mezo(eps=1e-5)")
    tuner.optimizer(lr=1e-6)
    smallest = half_place(model[0].weight)
    assert 1e-4 < smallest < 1e-3  # weights of 0.07: a unit in the last place is 2^-11
    with pytest.warns(UserWarning, match=f"not lost is {smallest:.2g}"):
        tuner.backward(torch.randn(2, 64).bfloat16(), lambda m, x: m(x).float().square().sum())


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


WORKER = """
import sys, torch, efftune
import torch.distributed as dist
from torch import nn
rank, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if size > 1:
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=size)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
data = torch.randn(8, 6, dtype=torch.float64).chunk(size)[rank]
tuner = efftune.apply(model, sys.argv[4])
optimizer = tuner.optimizer(lr=0.05)
for step in range(6):
    optimizer.zero_grad()
    bad = float("nan") if step == 2 and rank == size - 1 else 1.0  # a loss that is not finite on one of them
    tuner.backward(data, lambda m, x: m(x).square().mean() * bad)
    optimizer.step()
torch.save([p.detach() for p in model.parameters()], f"{path}/{size}-{rank}.pt")
"""


@pytest.mark.parametrize("recipe", ["mezo(samples=2)", "fedkseed(k=4, pro=True, interval=1, beta2=0.9)"])
def test_two_processes_equal_one_with_twice_the_batch(recipe, tmp_path):
    import subprocess
    import sys

    def run(size):
        workers = [
            subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(size), str(tmp_path), recipe])
            for rank in range(size)
        ]
        assert [worker.wait(timeout=120) for worker in workers] == [0] * size
        return [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]

    (one,), (first, second) = run(1), run(2)
    for p, q, r in zip(one, first, second, strict=True):
        assert torch.equal(q, r)
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)  # the scalars are pinned to float32


def test_shared_seeds_sum_up_to_the_run(tmp_path):
    """fedkseed: K numbers make the same model as all steps, up to the rounding of sums."""
    tuner, optimizer = trained("fedkseed(k=8)", steps=30)
    (part, seeds, totals) = optimizer.log.sums()[0]
    assert len(seeds) <= 8 and set(seeds) <= set(candidates(0, 8)) and len(totals) == len(seeds)
    again = efftune.apply(llama(), "fedkseed(k=8)")
    again.optimizer(lr=0.0).replay_sums(optimizer.log)
    moved = 0.0
    for p, q, r in zip(tuner.model.parameters(), again.model.parameters(), llama().parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        moved += float((p - r).detach().norm())
    assert moved > 1e-2
    for recipe, decay in (("mezo(momentum=0.5)", 0.0), ("sparsemezo", 0.0), ("mezo", 0.1)):
        _, optimizer = trained(recipe, steps=2, weight_decay=decay)
        with pytest.raises(efftune.EfftuneError, match="commute"):
            optimizer.replay_sums(optimizer.log)


def test_significant_seeds_are_drawn_more_often_and_corrected():
    """p = softmax of scaled mean |a|; with 1/(k·p) weights the expectation is the uniform one again."""
    total, count = torch.tensor([8.0, 1.0, 0.0, 3.0]), torch.tensor([4.0, 1.0, 0.0, 1.0])
    p = significance(total, count, 4)
    scaled = torch.tensor([(2 - 1) / 2, 0.0, (2 - 1) / 2, 1.0])  # the third counts with the mean of the others
    torch.testing.assert_close(torch.tensor(p), scaled.softmax(0))
    assert significance(None, None, 3) == [1 / 3] * 3
    for recipe, expected in (("fedkseed(k=4, pro=True)", p), ("fedkseed(k=4, pro=True, unbiased=True)", [0.25] * 4)):
        tuner = efftune.apply(Perceptron(), recipe)
        method, seeds = tuner.methods[-1], candidates(0, 4)
        method.load_state_dict(tuner.model, {"sum": total, "count": count})
        weight = dict.fromkeys(seeds, 0.0)
        for step in range(4000):
            ((seed, factor),) = method.directions(tuner.model, step)
            weight[seed] += factor / 4000
        for seed, want in zip(seeds, expected, strict=True):
            assert abs(weight[seed] - want) < 0.04


def test_what_was_learnt_about_seeds_is_in_the_checkpoint():
    tuner, _ = trained("fedkseed(k=8, pro=True, interval=2)", steps=5)
    again, _ = trained("fedkseed(k=8, pro=True, interval=2)", steps=0)
    again.load_state_dict(tuner.state_dict())
    known, copy = (t.methods[-1].state_dict(t.model) for t in (tuner, again))
    assert known.keys() == copy.keys() == {"sum", "count", "p", "at"}
    assert int(known["count"].sum()) == 5 and torch.equal(known["sum"], copy["sum"])
    assert tuner.methods[-1].directions(tuner.model, 9) == again.methods[-1].directions(again.model, 9)


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

    for _ in range(8):
        optimizer.zero_grad()
        for _ in range(2):
            tuner.backward(None, loss, scale=0.5)
        found = torch.stack([a for a, _ in optimizer.pending.values()])
        assert (found[found.isfinite()].abs() < 1e4).all()  # 1e4 / eps would be 1e7
        told |= bool(
            (found[found.isfinite()] != 0).any()
        )  # not always: the same seed twice in a row differs by nothing
        optimizer.step()
    assert told


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


def test_a_seed_that_comes_back_counts_by_its_age():
    a, b = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    optimizer = ZerothOrderSGD([("a", a), ("b", b)], lr=1.0, momentum=0.5)
    for seed, used in ((5, {id(a)}), (5, {id(b)}), (9, {id(a), id(b)})):
        before = {"a": a.detach().clone(), "b": b.detach().clone()}
        optimizer.accumulate(seed, 1.0, used)
        optimizer.step()
    for name, p, weight in (("a", a, 0.25), ("b", b, 0.5)):
        old, new = (perturb(torch.zeros(4), 1.0, seed=seed, stream=stream_of(name)) for seed in (5, 9))
        torch.testing.assert_close(p.detach() - before[name], -weight * old - new)


def test_the_second_moment_counts_what_told_something():
    """a = 1 throughout: the corrected root mean square is 1, whatever was skipped or empty before."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = ZerothOrderSGD([("p", p)], lr=1.0, beta2=0.99, dist="rademacher")
    for a in (None, math.nan, math.nan, 1.0, None, math.inf, 1.0):
        before = p.detach().clone()
        if a is not None:
            optimizer.accumulate(3, a, {id(p)})
        optimizer.step()
        expected = 1.0 if a == 1.0 else 0.0
        torch.testing.assert_close((p.detach() - before).abs(), torch.full_like(before, expected), rtol=1e-6, atol=1e-9)


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


def test_a_damaged_log_is_one_sentence(tmp_path):
    log, path = SeedLog(), tmp_path / "log"
    log.append(0, 7, torch.tensor(1.0), 0, [])
    log.save(path, {"recipe": "mezo"})
    data = path.read_bytes()
    path.write_bytes(data[:-16])
    with pytest.raises(efftune.EfftuneError, match="cut before its first entry"):
        SeedLog.load(path)
    log.parts = []
    log.save(path, {})
    with pytest.raises(efftune.EfftuneError, match="no seed log"):
        SeedLog.load(path)
    log.parts = [{"group": 3, "unused": []}]
    with pytest.raises(efftune.EfftuneError, match="4 groups"):
        ZerothOrderSGD([("w", nn.Parameter(torch.zeros(2)))]).replay(log)
