import math

import pytest
import torch
from torch import nn

import efftune
from efftune.ops.perturb import perturb
from efftune.optim.seed_log import SeedLog
from efftune.optim.zeroth_order import ZerothOrderSGD, stream_of
from tests.methods.models import Perceptron, llama, trained


def test_updates_below_the_last_place_are_not_lost_in_bfloat16():
    weight = nn.Parameter(torch.full((4096,), 0.02, dtype=torch.bfloat16))
    optimizer = ZerothOrderSGD([("w", weight)], lr=1e-6)
    for seed in range(64):
        optimizer.accumulate(seed, 1.0, {id(weight)})
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
