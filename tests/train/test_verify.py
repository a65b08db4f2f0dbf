"""verify can fail; compare puts recipes side by side."""

import json
from dataclasses import replace

import pytest
import torch

import efftune
from efftune import EfftuneError
from efftune.measure.compare import compare
from efftune.measure.estimates import EstimateStatistics, measure, score_of_squares
from efftune.measure.fidelity import fidelity, gradients
from efftune.measure.verify import judge, legend, table, verify
from efftune.optim.zeroth_order import ZerothOrderSGD
from efftune.train.task import CAUSAL_LM, Task
from tests.train.test_run import sentence

from .conftest import llama


def test_fidelity_of_known_errors():
    torch.manual_seed(0)
    exact, batches = torch.randn(200).double(), torch.randn(8, 200).double()
    noise = torch.randn(64, 200).double()
    fair = fidelity("w", 0.3 * noise, exact, batches, 100)
    assert (
        abs(fair.z) < 4
        and fair.error == pytest.approx(0.3, rel=0.2)
        and fair.variance_to_sgd == pytest.approx(0.09, rel=0.3)
    )
    assert fair.variance_per_byte == pytest.approx(fair.error**2 / 100)
    biased = fidelity("w", 0.3 * noise + 0.1 * exact, exact, batches, 0)
    assert biased.z > 6 and biased.bias == pytest.approx(0.1, rel=0.3) and biased.variance_per_byte is None
    judge([fair], 0.02)
    with pytest.raises(EfftuneError, match=r"1 of 2 gradients are biased; the most that of w: \d+\.\d% of its norm"):
        judge([fair, biased], 0.02)
    with pytest.raises(EfftuneError, match="NaN or Inf"):
        judge([fidelity("w", noise * torch.nan, exact, batches, 0)], 0.02)


def test_fair_noise_is_seldom_called_biased():
    generator = torch.Generator().manual_seed(1)
    z = []
    for _ in range(200):
        errors = torch.randn(16, 50, generator=generator).double()
        errors[:, 1:] *= 0.01  # nearly all of it in one direction: a quadratic form would have a heavy tail
        z.append(fidelity("w", errors, torch.ones(50).double(), torch.randn(4, 50).double(), 0).z)
    assert sum(v > 2.33 for v in z) <= 7 and abs(sum(z) / len(z)) < 0.3  # 1 % of 200, and 3.5 standard deviations


@pytest.fixture
def job(model_folder, write):
    rows = [{"question": sentence(i), "answer": sentence(i + 99)} for i in range(30)]
    return dict(model=str(model_folder), data=str(write("qa.jsonl", rows)), batch_size=4, seq_len=64, lr=1e-3)


@pytest.mark.parametrize("recipe", ["full + wtacrs(ratio=0.5)", "lora(r=4) + wtacrs(ratio=0.5) + mesa(bits=8)"])
def test_verify_passes_what_is_unbiased(job, recipe, tmp_path, capsys):
    results = verify({**job, "recipe": recipe, "out": str(tmp_path)}, seeds=12, batches=3, max_bias=0.05)
    assert any(r.error > 0.001 for r in results)
    assert "has a bias that is both significant" in capsys.readouterr().out
    kinds = {r.name for r in results if r.name.startswith("all, by keeps of")}
    assert len(kinds) == (3 if "mesa" in recipe else 0)  # norms, gated MLPs, attention
    saved = json.loads((tmp_path / "verify.json").read_text())
    assert len(saved["parameters"]) == len(results) and saved["seeds"] == 12


def test_verify_fails_on_what_is_biased(job):
    with pytest.raises(EfftuneError, match="gradients are biased"):
        verify({**job, "recipe": "full + wtacrs(ratio=0.3, sampler='topk', biased=True)"}, seeds=6, batches=3)


def test_the_table_says_what_it_shows_and_what_fails(job, capsys):
    with pytest.raises(EfftuneError, match="gradients are biased"):
        verify({**job, "recipe": "full + wtacrs(ratio=0.3, sampler='topk', biased=True)"}, seeds=6, batches=3)
    lines = capsys.readouterr().out.splitlines()
    columns = lines[0].replace("kept KiB", "kept_KiB").split()
    explained = [line for line in lines if any(line.startswith(name.replace("_", " ") + " ") for name in columns)]
    assert len(explained) == len(columns) == 6
    assert any(line.endswith("  biased") for line in lines)
    rule = next(line for line in lines if line.startswith("A row passes"))
    assert "bias is at most 2 % or z at most" in rule
    limit = float(rule.partition("z at most ")[2].partition(",")[0])
    for line in (line for line in lines[1:] if ".weight" in line):
        bias, z = line.split()[1:3]
        if abs(float(z) - limit) > 0.1 and abs(float(bias[:-1]) - 2) > 0.01:
            assert line.endswith("  biased") == (float(bias[:-1]) > 2 and float(z) > limit), line


def test_what_is_left_out_on_purpose_is_shown_and_passes(job, tmp_path, capsys):
    settings = {**job, "lr": 1e-2, "out": str(tmp_path)}
    results = verify({**settings, "recipe": "full + stagefilter(window=4)"}, seeds=12, batches=6)
    *others, own = results
    assert own.name == "all, by the choice of stagefilter" and own.by_design and own.bias > 0.05
    assert all(r.error < 1e-4 and not r.by_design for r in others)  # of all rows, though some have been left out since
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith(own.name)][0].endswith("by design")
    assert "biased by design, towards the rows" in out and "but for the choice of stagefilter" in out
    assert json.loads((tmp_path / "verify.json").read_text())["parameters"][-1]["by_design"]
    with pytest.raises(EfftuneError, match="gradients are biased"):  # another bias does not pass with it
        recipe = "full + wtacrs(ratio=0.3, sampler='topk', biased=True) + stagefilter(window=4)"
        verify({**settings, "recipe": recipe}, seeds=6, batches=3)
    rows = verify({**settings, "recipe": "mezo + stagefilter(window=2)"}, seeds=8, batches=2)
    assert rows[-1].by_design  # and what is perturbed has one loss, of all rows
    found = json.loads((tmp_path / "verify.json").read_text())["directions"]
    assert found["slope"] == pytest.approx(1, abs=0.01) and found["residual"] < 0.05


def test_dft_is_held_against_its_own_objective(job, capsys):
    assert all(r.error < 1e-4 for r in verify({**job, "recipe": "full + dft"}, seeds=4, batches=2))
    assert "held against the exact one of dft's own objective" in capsys.readouterr().out
    ids = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    batch, model = {"input_ids": ids, "labels": ids}, llama().double()
    log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    (-(log_p.detach().exp() * log_p).sum() / CAUSAL_LM.terms(batch)).backward()
    tuner = efftune.apply(llama(), "full + dft + mesa(bits=4)")
    with tuner.exactly():
        exact = gradients(tuner, CAUSAL_LM, batch)
    for name, p in model.named_parameters():
        if name in exact:
            assert (exact[name].double() - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-12, name


def test_a_legend_for_each_kind_of_recipe():
    row = fidelity("w", torch.zeros(4, 3).double(), torch.ones(3).double(), torch.randn(3, 3).double(), 0)
    biased = replace(row, bias=0.5, z=9.0)
    assert table([biased], 0.02).endswith("biased") and not table([biased], 0.6).endswith("biased")
    assert table([replace(biased, by_design=True)], 0.02).endswith("by design")
    assert "at most 0.5 %" in legend([row], 0.005) and "directions" not in legend([row], 0.02)
    whole = EstimateStatistics(100, 1.0, 0.0, 0.01, 1.0, 0.1, 0.0, 102.0, 102.0, {})
    assert "pass where they are within 2 % of 1" in legend([row], 0.02, whole)
    judge([row, replace(biased, by_design=True)], 0.02)
    with pytest.raises(EfftuneError, match="1 of 2 gradients are biased"):
        judge([row, biased], 0.02)


def test_compare(job, tmp_path, capsys):
    settings = {**job, "steps": 3, "out": str(tmp_path / "c"), "eval_fraction": 0.2, "sample_tokens": 0}
    rows = compare(["full", "full + mesa(bits=4)", "mezo"], settings)
    assert rows[1]["saved"] < 0.5 * rows[0]["saved"] and rows[2]["saved"] == 0
    assert all(row["eval_loss"] > 0 and row["tokens_per_s"] > 0 and row["peak"] > 0 for row in rows)
    out = tmp_path / "c"
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "| `full + mesa(bits=4)` |" in (out / "compare.md").read_text()
    assert len(json.loads((out / "compare.json").read_text())) == 3
    assert (out / "1-full-mesa-bits-4" / "report.html").exists()
    with pytest.raises(EfftuneError, match="two different recipes"):
        compare(["full"], settings)
    with pytest.raises(EfftuneError, match="no method 'nonsense'"):
        compare(["full", "nonsense"], {**settings, "out": str(tmp_path / "d")})
    assert not (tmp_path / "d").exists()


def directions(job, recipe, tmp_path, seeds=24, **settings):
    out = {**job, "recipe": recipe, "out": str(tmp_path), **settings}
    rows = {r.name: r for r in verify(out, seeds=seeds, batches=2)}
    return rows, json.loads((tmp_path / "verify.json").read_text())["directions"]


@pytest.mark.parametrize(
    ("recipe", "entries", "excess"),  # what the length of an estimate is beyond that, with exact derivatives
    [
        ("mezo", 1.0, lambda d: d + 2),
        ("mezo(dist='rademacher', samples=4)", 1.0, lambda d: (d + 3) / 4),
        ("sparsemezo(sparsity=0.75)", 0.25, lambda d: d + 2),
        ("mezo(per_layer='expectation', update='log')", 1.0, None),
        ("lora(r=4) + fedkseed(pro=True, unbiased=True)", None, lambda d: d + 2),
    ],
)
def test_estimates_are_held_against_exact_derivatives(job, recipe, entries, excess, tmp_path, capsys):
    rows, found = directions(job, recipe, tmp_path, seeds=48)
    assert found["slope"] == pytest.approx(1, abs=0.01) and 0 < found["residual"] < 0.02  # eps=1e-3, float32
    assert abs(found["fairness_z"]) < 4 and 0.05 < found["fairness_error"] < 0.3
    by_eps = {float(eps): r for eps, r in found["residuals"].items()}
    assert by_eps[1e-3] == pytest.approx(found["residual"], rel=3)  # of the first few steps
    assert by_eps[1e-1] > 20 * by_eps[1e-3] and by_eps[1e-5] > 2 * by_eps[1e-4]  # of the difference; rounding
    printed = capsys.readouterr().out
    assert "a / <g, z>" in printed and "1.0e-03: 0." in printed
    trained = sum(p.numel() for p in llama().parameters())
    if entries:
        assert found["entries"] == pytest.approx(entries * trained, rel=0.01)
    if excess:
        assert found["expected"] == pytest.approx(excess(found["entries"]))
    assert found["length"] == pytest.approx(found["expected"], rel=0.8)  # 4 standard errors
    assert all(r.error > 10 and r.kept == 0 and r.variance_per_byte is None for r in rows.values())


def test_one_point_has_a_larger_variance(job, tmp_path):
    """Of two directions instead of one: where batch and weights are the same, the last step's is all that differs."""
    _, two = directions(job, "mezo", tmp_path / "two", seeds=32)
    _, one = directions(job, "mezo(points=1)", tmp_path / "one", seeds=32)
    assert one["residual"] == pytest.approx(1, rel=0.5) and two["residual"] < 0.02
    assert one["expected"] == two["expected"] and abs(one["slope"] - 1) < 1


def test_an_eps_that_is_too_large_fails(job):
    with pytest.raises(EfftuneError, match=r"The differences of losses are -?\d\.\d\d times the derivatives along"):
        verify({**job, "recipe": "mezo(eps=1.0)"}, seeds=24, batches=2)


def test_directions_that_are_drawn_unfairly_fail(job, tmp_path):
    """One seed for good, so that the estimate has a mean of rank one."""
    with pytest.raises(EfftuneError, match="gradients are biased|some directions more often"):
        verify({**job, "recipe": "fedkseed(k=1, seed=2)", "out": str(tmp_path)}, seeds=24, batches=2)
    found = json.loads((tmp_path / "verify.json").read_text())["directions"]
    assert found["slope"] == pytest.approx(1, abs=0.05) and found["residual"] < 0.05
    assert abs(found["fairness"] - 1) > 0.5 and found["slope_z"] is None  # infinite, which JSON does not have
    fair = EstimateStatistics(100, 1.0, 0.0, 0.01, 1.0, 0.1, 0.0, 102.0, 102.0, {})
    judge([], 0.02, fair)
    with pytest.raises(EfftuneError, match="Along the gradient the estimates have 1.50 times its length"):
        judge([], 0.02, replace(fair, fairness=1.5, fairness_z=5.0))


def test_the_score_of_squares_is_normal():
    draws = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.tensor([score_of_squares(float(row.square().mean()), 32) for row in draws])
    for limit, share in ((1.645, 0.1), (2.576, 0.01), (3.0, 0.0027)):
        count = int((z.abs() > limit).sum())
        assert abs(count - 4000 * share) < 4 * (4000 * share) ** 0.5


def test_what_is_not_perturbed_misses_its_gradient():
    """A weight that another module reads without calling the one that owns it."""

    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)

        def forward(self, x):
            return self.b(torch.nn.functional.linear(x, self.a.weight).tanh())

    tuner = efftune.apply(Reads(), "mezo")
    optimizer, data = tuner.optimizer(0.1), [torch.randn(5, 6), torch.randn(5, 6)]
    assert isinstance(optimizer, ZerothOrderSGD)
    task = Task(lambda m, x: m(x).square().sum(), terms=len)
    with pytest.warns(UserWarning, match="no module's forward used a.weight"):
        rows, whole = measure(tuner, optimizer, task, data, 16)
    rows = {r.name: r for r in rows}
    assert rows["a.weight"].bias == pytest.approx(1) and rows["a.weight"].z == float("inf")
    assert rows["b.weight"].bias < 0.02 and whole.slope == pytest.approx(1, abs=0.01)
    with pytest.raises(EfftuneError, match=r"the most that of a.weight: 100\.0% of its norm"):
        judge(list(rows.values()), 0.02, whole)


def test_a_round_of_numbers_is_measured(job):
    """For ±1 the error of a full block is the square root of (block - 1)/k."""
    rows = {r.name: r for r in verify({**job, "recipe": "ferret(k=4, block=16)"}, seeds=32, batches=2, max_bias=0.5)}
    row = rows["model.layers.0.mlp.up_proj.weight"]
    assert row.error == pytest.approx((15 / 4) ** 0.5, rel=0.05) and row.bias < 0.2 and abs(row.z) < 4


def test_verify_refuses_what_has_no_gradient(job, monkeypatch):
    with pytest.raises(EfftuneError, match="--objective accuracy has no gradient to hold estimates against"):
        verify({**job, "recipe": "mezo", "objective": "accuracy"}, seeds=4, batches=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EfftuneError, match="start it without torchrun"):
        verify({**job, "recipe": "mezo"}, seeds=4, batches=2)
