import functools

import pytest
import torch
from torch import nn

import efftune
from efftune.methods.zeroth_order.ferret import Ferret
from efftune.ops.perturb import perturb
from efftune.optim import projection
from efftune.optim.seed_log import SeedLog, fingerprint
from efftune.train import checkpoint, state
from efftune.tuner import CLOCK
from tests import children
from tests.methods.models import batch, llama, loss_fn

DISTS = ["rademacher", "normal"]


def direction(like, seed, stream, dist, offset=0):
    return perturb(torch.zeros_like(like), 1.0, seed=seed, stream=stream, offset=offset, dist=dist)


@pytest.mark.parametrize("dist", DISTS)
def test_a_change_is_projected_block_by_block_and_made_from_its_numbers(dist):
    """By the formula, over two blocks of 40, one of 20 that is left over, and fewer entries than seeds in none."""
    torch.manual_seed(0)
    change, w, seeds = torch.randn(10, 10, dtype=torch.float64), torch.randn(10, 10, dtype=torch.float64), [5, 9, 2]
    how = dict(stream=7, block=40, dist=dist)
    a = projection.project(change, seeds, **how, scale=0.25)
    assert a.dtype == torch.float32 and len(a) == projection.count(100, 3, 40) == 9
    zs = [direction(change.flatten(), seed, 7, dist) for seed in seeds]
    expected, back = [], w.flatten().clone()
    for start in (0, 40, 80):
        part = slice(start, min(start + 40, 100))
        for z in zs:
            expected.append(0.25 / 3 * z[part] @ change.flatten()[part])
            back[part] += expected[-1].float() * z[part]
    torch.testing.assert_close(a, torch.stack(expected).float())
    torch.testing.assert_close(projection.reconstruct(w, a, seeds, **how).flatten(), back, rtol=1e-6, atol=1e-7)


def test_pieces_and_the_layout_of_a_tensor_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    w, change = torch.randn(30, 50), torch.randn(30, 50)
    how = dict(stream=7, block=64, dist="rademacher")
    a = projection.project(change, range(4), **how)
    made = projection.reconstruct(w, a, range(4), **how)
    monkeypatch.setattr(projection, "PIECE", 200)  # three blocks at a time
    assert torch.equal(projection.project(change, range(4), **how), a)
    turned = w.T.contiguous().T
    assert torch.equal(projection.reconstruct(turned, a, range(4), **how, out=turned), made)
    assert not turned.is_contiguous() and torch.equal(turned, made)


def test_a_block_has_no_more_numbers_than_entries():
    change = torch.randn(70)
    a = projection.project(change, range(100, 164), stream=1, block=64, dist="rademacher")
    assert len(a) == 64 + 6 == projection.count(70, 64, 64)
    one = torch.randn(1)  # z² = 1: nothing is lost
    a = projection.project(one, range(8), stream=1, block=64, dist="rademacher")
    again = projection.reconstruct(torch.zeros(1), a, range(8), stream=1, block=64, dist="rademacher")
    assert len(a) == 1 and torch.equal(again, one)


@pytest.mark.parametrize("dist, sign", [("rademacher", -1), ("normal", 1)])
@pytest.mark.parametrize("k", [1, 4])
def test_the_reconstruction_is_unbiased_and_its_error_is_what_the_formula_says(dist, sign, k):
    """E Δ̃ = Δ, Bonferroni-bounded, and E‖Δ̃ − Δ‖² = Σ_b (d_b ± 1)/k_b · ‖Δ_b‖² within its standard error, over 4000
    rounds; three blocks, of 16, 16 and 8."""
    torch.manual_seed(0)
    change, method, draws = torch.randn(5, 8), Ferret(k=k, block=16, dist=dist, scale=1.0), []
    zero = torch.zeros_like(change)
    for turn in range(4000):
        seeds = method.seeds(turn)
        draws.append(method.reconstruct("w", zero, method.project("w", change, zero, seeds), seeds))
    draws = torch.stack(draws)
    z = (draws.mean(0) - change) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 4.2  # 40 entries, p < 1e-3 in all
    errors = (draws - change).square().sum((1, 2))
    blocks = change.flatten().split(16)
    expected = sum((len(b) + sign) / k * b.square().sum() for b in blocks)
    assert (errors.mean() - expected).abs() < 4 * errors.std() / len(errors) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dist", DISTS)
def test_blocks_are_perturbed_with_stochastic_rounding(dtype, dist, monkeypatch):
    """The same bits as `perturb` gives on each block; 7 entries in a block, so that those for rounding are shared."""
    monkeypatch.setattr(projection, "PIECE", 21)
    torch.manual_seed(0)
    w, a, seeds = torch.randn(60).to(dtype), torch.randn(9, 3), [8, 3, 5]
    made = projection.reconstruct(w, a.flatten(), seeds, stream=4, block=7, dist=dist)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for b, start in enumerate(range(0, 60, 7)):
        part = slice(start, start + 7)
        how = dict(seed=seeds, stream=4, offset=start, dist=dist, rounding="stochastic")
        assert torch.equal(made[part], perturb(w[part], a[b].to(wide), **how))


def started(recipe, dtype=torch.float32, lr=1e-2):
    tuner = efftune.apply(llama(dtype=dtype), recipe)  # llama() sets the seed: LoRA's first draws are the same
    optimizer = tuner.optimizer(lr=lr, weight_decay=0.01)
    return tuner, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train(tuner, optimizer, scheduler, steps):
    for step in steps:
        optimizer.zero_grad()
        for micro in batch(step).chunk(2):
            tuner.backward(micro, loss_fn, scale=0.5)
        optimizer.step()
        scheduler.step()
    return tuner


def log_of(tuner):
    return tuner.run.states["ferret"].log


RECIPES = [
    "ferret(k=16, block=512, local_steps=3)", "ferret(k=16, block=512, local_steps=3, dist='normal', scale=1.0)",
    "lora(r=4) + ferret(k=4, block=64, local_steps=3)", "lisa(layers=1, interval=2) + ferret(k=8, local_steps=3)",
    "ferret(k=8, local_steps=3) + lisa(layers=1, interval=3)",
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["full", "lora(r=4)"])
def test_a_round_is_the_optimizers_steps_projected(recipe):
    """Until the round ends the weights are those of the recipe without ferret, bit for bit."""
    plain = train(*started(recipe), range(2))
    assert_equal(train(*started(recipe + " + ferret(local_steps=3)"), range(2)), plain)
    plain = train(*started(recipe), range(3))
    tuner, base = train(*started(recipe + " + ferret(local_steps=3)"), range(3)), started(recipe)[0].named_trained()
    method, moved = tuner.methods[-1], 0.0
    for name, p in tuner.named_trained().items():
        a = method.project(name, plain.named_trained()[name], base[name], method.seeds(0))
        expected = method.reconstruct(name, base[name], a, method.seeds(0))
        assert torch.equal(p, expected), name
        moved += float((p - base[name]).detach().norm())
    assert moved > 0.1


def assert_equal(tuner, other):
    for (name, p), q in zip(tuner.named_trained().items(), other.named_trained().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_log_replays_to_the_same_bits(recipe, dtype, tmp_path):
    tuner = train(*started(recipe, dtype), range(9))
    log_of(tuner).save(tmp_path / "log", {"note": 1})
    log, about = SeedLog.load(tmp_path / "log")
    assert about["note"] == 1 and about["count"] == log.count > 0
    again = started(recipe, dtype)[0]
    before = {name: p.detach().clone() for name, p in again.named_trained().items()}
    next(m for m in again.methods if isinstance(m, Ferret)).replay(again.model, log)
    assert_equal(tuner, again)
    assert any(not torch.equal(p, before[name]) for name, p in again.named_trained().items())


@functools.cache
def unbroken(recipe):
    return train(*started(recipe), range(9))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_run_resumed_within_a_round_goes_on_bit_for_bit(recipe, at, tmp_path):
    whole = unbroken(recipe)
    tuner, optimizer, scheduler = started(recipe)
    train(tuner, optimizer, scheduler, range(at))
    watch = state.Watch(tuner.model)
    path = checkpoint.save(tmp_path, at, *state.capture(tuner, optimizer, scheduler, watch), {}, 1)
    _, weights, rest = checkpoint.load(path, {})
    kept = rest["optimizer"][CLOCK]["methods"]["ferret"]["anchor"]
    assert bool(kept) == bool(at % 3)  # between rounds the anchor is the weights
    again, optimizer, scheduler = started(recipe)
    train(again, optimizer, scheduler, range(1))  # leaves an anchor and a log that must go
    state.restore(again, optimizer, scheduler, weights, rest)
    train(again, optimizer, scheduler, range(at, 9))
    assert_equal(again, whole)
    first, second = (log_of(t).state_dict() for t in (whole, again))
    assert first["parts"] == second["parts"] and torch.equal(first["entries"], second["entries"])
    assert torch.equal(first["numbers"], second["numbers"])


def test_what_is_frozen_for_a_whole_round_sends_nothing():
    tuner = train(*started("lisa(layers=1, interval=3) + ferret(k=8, local_steps=3)", torch.bfloat16), range(6))
    lisa = tuner.methods[1]
    for step, numbers in log_of(tuner).rounds():
        layers = {int(name.split(".")[2]) for name in numbers if ".layers." in name}
        assert layers == set(lisa.drawn(3, step)) and "lm_head.weight" in numbers
    drawn = {i for turn in range(2) for i in lisa.drawn(3, 3 * turn)}
    base = started("full", torch.bfloat16)[0].named_trained()
    for name, p in tuner.named_trained().items():
        if ".layers." in name and p.ndim == 2:
            assert torch.equal(p, base[name]) == (int(name.split(".")[2]) not in drawn)


def test_a_cut_log_gives_whole_rounds(tmp_path):
    tuner = train(*started("ferret(k=4, local_steps=1)"), range(3))
    log_of(tuner).save(tmp_path / "log", {})
    data, counts = (tmp_path / "log").read_bytes(), [sum(map(len, n.values())) for _, n in log_of(tuner).rounds()]
    expected = train(*started("ferret(k=4, local_steps=1)"), range(2))
    for lost in (1, 4 * counts[2]):
        (tmp_path / "cut").write_bytes(data[:-lost])
        log, about = SeedLog.load(tmp_path / "cut")
        assert log.count == sum(counts[:2]) and about["count"] == sum(counts)
        again = started("ferret(k=4, local_steps=1)")[0]
        again.methods[-1].replay(again.model, log)
        assert_equal(again, expected)
    (tmp_path / "cut").write_bytes(data[: -4 * sum(counts[1:]) - 1])
    with pytest.raises(efftune.EfftuneError, match="cut before its first entry"):
        SeedLog.load(tmp_path / "cut")


def test_a_log_ends_where_it_is_longer_than_the_weights():
    tuner, optimizer, scheduler = started("ferret(k=8, block=16, local_steps=1)")  # half as long each round
    train(tuner, optimizer, scheduler, range(1))
    assert log_of(tuner).count > 0
    train(tuner, optimizer, scheduler, range(1, 3))
    assert log_of(tuner) is None
    again = started("ferret(k=8, block=16, local_steps=1)")[0]
    again.load_state_dict(tuner.state_dict())
    assert log_of(again) is None
    train(tuner, optimizer, scheduler, range(3, 4))


def client(recipe, rank, steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = torch.randn(8, 6).chunk(2)[rank]
    tuner = efftune.apply(model, recipe)
    optimizer = tuner.optimizer(lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        tuner.backward(data, lambda m, x: m(x).square().mean())
        optimizer.step()
    return tuner


SHARED = "ferret(k=2, block=16, local_steps=2)"


def worker(rank, path):
    import torch.distributed.nn.functional  # noqa: F401  # before the group that it would keep

    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    tuner = client(SHARED, rank, 6)
    numbers = [{n: torch.tensor(a) for n, a in of_round.items()} for _, of_round in log_of(tuner).rounds()]
    torch.save([tuner.named_trained(), numbers], f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_exchange_numbers_only_and_stay_together(tmp_path):
    """What they apply is the mean of what each of them, stepping alone on its own data, would send."""
    assert children.wait([children.start(worker, rank, tmp_path) for rank in (0, 1)]) == [0, 0]
    (first, log), (second, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    method, start = Ferret(k=2, block=16, local_steps=2), client("full", 0, 0).named_trained()
    alone = [client("full", rank, 2).named_trained() for rank in (0, 1)]
    assert len(log) == len(other) == 3
    for name, base in start.items():
        assert torch.equal(first[name], second[name])
        assert all(torch.equal(a[name], b[name]) for a, b in zip(log, other, strict=True))
        own = [method.project(name, w[name], base, method.seeds(0)) for w in alone]
        assert not torch.equal(*own)
        torch.testing.assert_close(log[0][name], (own[0] + own[1]) / 2, rtol=1e-5, atol=1e-8)
        w = base.detach().clone()
        for turn, numbers in enumerate(log):
            method.reconstruct(name, w, numbers[name], method.seeds(turn), out=w)
        assert torch.equal(w, first[name])


def test_nothing_is_left_behind():
    tuner, optimizer, scheduler = started("ferret(k=4, block=4096)")
    train(tuner, optimizer, scheduler, range(2))
    assert "ferret: 120 numbers a round of 10 steps" in tuner.summary()
    train(tuner, optimizer, scheduler, range(2, 10))
    assert log_of(tuner).count == 120
    tuner.seek(0)  # another run, from the weights as they are now
    assert log_of(tuner).count == 0 and tuner.run.states["ferret"].base == fingerprint(tuner.model)


def test_an_optimizer_made_elsewhere_is_followed():
    tuner = efftune.apply(llama(), "ferret(k=4, local_steps=1)")
    names = [name for name, _ in tuner.named_trained().items() if "layers.1" in name]
    optimizer = tuner.attach(torch.optim.SGD([tuner.named_trained()[n] for n in names], lr=0.1))
    tuner.backward(batch(), loss_fn)
    optimizer.step()
    ((_, numbers),) = log_of(tuner).rounds()
    assert set(numbers) == set(names)


def test_weights_that_are_loaded_after_the_optimizer_was_made_are_where_it_begins():
    tuner, other = efftune.apply(llama(), "full + ferret(local_steps=1)"), llama(seed=1)
    optimizer = tuner.optimizer(lr=1e-3)
    tuner.model.load_state_dict(other.state_dict())
    tuner.backward(batch(), loss_fn)
    optimizer.step()
    for p, q in zip(tuner.model.parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() < 0.02  # an Adam step, projected
    assert tuner.run.states["ferret"].base == fingerprint(other)
