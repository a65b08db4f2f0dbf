import math

import pytest
import torch
from torch import nn

import efftune
from efftune.ops.perturb import perturb
from efftune.optim.directions import stream_of
from efftune.optim.seed_log import SeedLog
from efftune.optim.zeroth_order import ZerothOrderSGD
from tests.methods.models import Perceptron, llama, trained


def test_updates_below_the_last_place_are_not_lost_in_bfloat16():
    weight = nn.Parameter(torch.full((4096,), 0.02, dtype=torch.bfloat16))
    optimizer = ZerothOrderSGD([("w", weight)], lr=1e-6)
    for seed in range(64):
        optimizer.scalars.accumulate(seed, 1.0, {id(weight)})
        optimizer.step()
    moved = (weight.double() - 0.02).std()
    assert 0.2 * 8e-6 < moved < 5 * 3e-4  # rounding to nearest would leave every weight where it was
    assert (weight.double() - torch.tensor(0.02).bfloat16().double()).mean().abs() < 5 * moved / 64


def test_loss_backward_is_refused():
    """As Hugging Face's Trainer would: gradients that nobody applies must not pass in silence."""
    tuner = efftune.apply(Perceptron(), "mezo")
    optimizer = tuner.optimizer(lr=0.1)
    tuner.model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(efftune.EfftuneError, match="tuner.backward"):
        optimizer.step()


def test_another_optimizer_is_refused():
    tuner = efftune.apply(Perceptron(), "mezo")
    tuner.attach(torch.optim.SGD(tuner.param_groups(), lr=0.1))
    with pytest.raises(efftune.EfftuneError, match="tuner.optimizer"):
        tuner.backward(torch.randn(2, 8), lambda m, x: m(x).sum())
    with pytest.raises(efftune.EfftuneError, match="name, parameter"):
        ZerothOrderSGD([nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("update, dtype", [("stochastic", torch.bfloat16), ("exact", torch.float32)])
def test_the_mean_update_is_what_was_asked_for(update, dtype):
    """η·a = 1e-7 on 10 000 weights of 0.02, within 3 standard errors; to nearest in bfloat16 almost none would move."""
    w = torch.full((10_000,), 0.02, dtype=dtype)
    moved = torch.zeros(10_000, dtype=torch.float64)
    steps = 40
    for seed in range(steps):
        weight = nn.Parameter(w.clone())
        optimizer = ZerothOrderSGD([("w", weight)], lr=1e-7, dist="rademacher", update=update)
        optimizer.scalars.accumulate(seed, 1.0, {id(weight)})
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
    "fedkseed(k=3, update='log', momentum=0.5)", "full + lisa(layers=1, interval=2) + mezo(update='log', samples=2)",
    "mezo(per_layer='variance', momentum=0.5)", "lora(r=4) + mezo(per_layer='expectation', update='log')",
    "sparsemezo(sparsity=0.6)", "lora(r=4) + mezo(momentum=0.8)", "lora(r=4) + lisa(layers=1, interval=2) + mezo",
]  # fmt: skip


@pytest.mark.parametrize("recipe", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_log_replays_to_the_same_bits(recipe, dtype, tmp_path):
    decays = dtype == torch.float32 and "log" not in recipe
    tuner, optimizer = trained(recipe, dtype=dtype, weight_decay=0.1 if decays else 0.0)
    optimizer.log.save(tmp_path / "log", {"note": 1})
    log, about = SeedLog.load(tmp_path / "log")
    assert about["note"] == 1 and about["count"] == len(log.entries) > 0
    again = efftune.apply(llama(dtype=dtype), recipe)  # llama() sets the seed: LoRA's first draws are the same
    before = [p.detach().clone() for p in again.named_trained().values()]
    again.optimizer(lr=0.0).replay(log)
    for (name, p), q in zip(tuner.named_trained().items(), again.named_trained().values(), strict=True):
        assert torch.equal(p, q), name
    assert any(not torch.equal(p, b) for p, b in zip(again.named_trained().values(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_log_of_a_thousand_steps_replays_to_the_same_bits(dtype):
    tuner, optimizer = trained("mezo(momentum=0.9)", steps=1000, dtype=dtype)
    again = efftune.apply(llama(dtype=dtype), "mezo(momentum=0.9)")
    again.optimizer(lr=0.0).replay(optimizer.log)
    for p, q in zip(tuner.named_trained().values(), again.named_trained().values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("recipe", VARIANTS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(recipe):
    whole, first = trained(recipe)
    parts, second = trained(recipe, resume_at=3)
    for p, q in zip(whole.named_trained().values(), parts.named_trained().values(), strict=True):
        assert torch.equal(p, q)
    assert first.log.fetch().tobytes() == second.log.fetch().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_log_of_updates_is_rounded_once(dtype):
    """update='log': w = round(w_0 + Σ c·z), so that 200 steps have the error of one rounding."""
    w = torch.randn(1000).mul(0.02).to(dtype)
    p = nn.Parameter(w.clone())
    optimizer = ZerothOrderSGD([("p", p)], lr=1e-4, momentum=0.5, update="log")
    exact, size, recent = w.double(), w.double().abs(), []
    for step in range(200):
        seed = step % 7
        optimizer.scalars.accumulate(seed, 0.1, {id(p)})
        optimizer.step()
        recent = [(seed, torch.tensor(-1e-5, dtype=torch.float32).double()), *recent][:10]  # 0.5^10 < 1e-3
        for age, (old, c) in enumerate(recent):
            added = 0.5**age * c * perturb(torch.zeros(1000), 1.0, seed=old, stream=stream_of("p")).double()
            exact, size = exact + added, size + added.abs()
    half = torch.finfo(dtype).eps / 2 * torch.exp2(exact.abs().log2().floor())
    assert ((p.detach().double() - exact).abs() <= half + 8 * 2**-24 * size).all()  # 7 seeds, and w


def test_a_log_of_updates_refuses_what_is_no_sum():
    p = [("p", nn.Parameter(torch.zeros(4)))]
    for settings in ({"weight_decay": 0.1}, {"sparsity": 0.5}):
        with pytest.raises(efftune.EfftuneError, match="no sum over its directions"):
            ZerothOrderSGD(p, update="log", **settings)
    optimizer = ZerothOrderSGD(p, lr=1.0, update="log")
    optimizer.scalars.accumulate(3, 1.0, {id(p[0][1])})
    optimizer.step()
    with pytest.raises(efftune.EfftuneError, match="before the trained weights are loaded"):
        ZerothOrderSGD(p, lr=1.0, update="log").load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("per_layer", ["none", "variance", "expectation"])
def test_tensors_are_perturbed_by_their_size(per_layer):
    """L = |θ|²/2 in two tensors of different sizes and one of zeros: a = Σ s·θ·z exactly, and the update is −lr·a·u·z,
    with mean −lr·u·s·∇L."""
    torch.manual_seed(0)
    start = {
        "small": torch.randn(300).double() * 0.01,
        "large": torch.randn(200).double(),
        "zero": torch.zeros(5).double(),
    }

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in start.items():
                setattr(self, name, nn.Parameter(value.clone()))

        def forward(self):
            return sum(p.square().sum() for p in self.parameters()) / 2

    tuner = efftune.apply(Quadratic(), f"mezo(per_layer={per_layer!r}, eps=0.1)")
    optimizer = tuner.optimizer(lr=0.01)
    tuner.backward(None, lambda model, batch: model())
    ((seed, (a, _)),) = optimizer.scalars.pending.items()
    mean = math.sqrt((300 * 1e-4 + 200) / 500)
    s = {"small": 2.0 ** round(math.log2(0.01 / mean)), "large": 2.0 ** round(math.log2(1 / mean)), "zero": 1.0}
    if per_layer == "none":
        s = dict.fromkeys(s, 1.0)
    z = {n: perturb(torch.zeros_like(w), 1.0, seed=seed, stream=stream_of(n)) for n, w in start.items()}
    expected = sum(s[n] * (start[n] * z[n]).sum() for n in start)
    torch.testing.assert_close(a, expected, rtol=1e-9, atol=0)
    optimizer.step()
    for name, p in tuner.named_trained().items():
        u = 1 / s[name] if per_layer == "variance" else 1.0
        torch.testing.assert_close(p.detach(), start[name] - 0.01 * a * u * z[name], rtol=1e-6, atol=1e-9)


def test_a_seed_that_comes_back_counts_by_its_age():
    a, b = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    optimizer = ZerothOrderSGD([("a", a), ("b", b)], lr=1.0, momentum=0.5)
    for seed, used in ((5, {id(a)}), (5, {id(b)}), (9, {id(a), id(b)})):
        before = {"a": a.detach().clone(), "b": b.detach().clone()}
        optimizer.scalars.accumulate(seed, 1.0, used)
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
            optimizer.scalars.accumulate(3, a, {id(p)})
        optimizer.step()
        expected = 1.0 if a == 1.0 else 0.0
        torch.testing.assert_close((p.detach() - before).abs(), torch.full_like(before, expected), rtol=1e-6, atol=1e-9)
