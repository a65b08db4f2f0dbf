import pytest
import torch

import efftune
from efftune.methods.zeroth_order.fedkseed import candidates, significance
from tests.methods.models import Perceptron, llama, trained


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
        tuner.load_state_dict({"step": 0, "methods": {"fedkseed": {"sum": total, "count": count}}})
        weight = dict.fromkeys(seeds, 0.0)
        for tuner.step in range(4000):
            ((seed, factor),) = method.directions(tuner.run)
            weight[seed] += factor / 4000
        for seed, want in zip(seeds, expected, strict=True):
            assert abs(weight[seed] - want) < 0.04


def test_what_was_learnt_about_seeds_is_in_the_checkpoint():
    tuner, _ = trained("fedkseed(k=8, pro=True, interval=2)", steps=5)
    again, _ = trained("fedkseed(k=8, pro=True, interval=2)", steps=0)
    again.load_state_dict(tuner.state_dict())
    known, copy = (t.state_dict()["methods"]["fedkseed"] for t in (tuner, again))
    assert known.keys() == copy.keys() == {"sum", "count", "p", "at"}
    assert int(known["count"].sum()) == 5 and torch.equal(known["sum"], copy["sum"])
    tuner.step = again.step = 9
    assert tuner.methods[-1].directions(tuner.run) == again.methods[-1].directions(again.run)


@pytest.mark.parametrize("settings", ["k=4, interval=1", "k=3, samples=4, interval=2"])
def test_how_a_step_is_cut_does_not_tell_seeds_apart(settings):
    """What is learnt of a seed is |a| of the step, not of its micro-batches."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for cuts in (1, 4):
        torch.manual_seed(0)
        tuner = efftune.apply(Perceptron().double(), f"fedkseed(pro=True, {settings})")
        optimizer = tuner.optimizer(lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            for rows in x.double().chunk(cuts):
                tuner.backward(rows, lambda m, rows: (m(rows) ** 3).mean(), scale=1 / cuts)
            optimizer.step()
        found.append(tuner.state_dict()["methods"]["fedkseed"])
    one, four = found
    assert torch.equal(one["count"], four["count"]) and len(set(one["p"])) > 1
    torch.testing.assert_close(one["sum"], four["sum"], rtol=1e-5, atol=1e-9)
