import json
import math

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.train.batches import Data
from efftune.train.config import TrainConfig
from efftune.train.loop import NonFinite, Trainer, evaluate, learning_rate_factor
from efftune.train.rundir import RunDir
from efftune.train.task import Task

from .conftest import llama, packed, trainer


def weights(t):
    return {name: p.detach().clone() for name, p in t.tuner.named_trained().items()}


@pytest.mark.parametrize("recipe", ["full", "lora(r=4)"])
def test_one_times_four_is_four_times_one(recipe):
    made = []
    for batch_size, accum in ((4, 1), (1, 4)):
        t = trainer(recipe, batch_size=batch_size, grad_accum=accum, steps=4, lr=1e-3)
        t.fit()
        made.append(weights(t))
    for name, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][name], rtol=1e-3, atol=2e-5)


def test_the_gradient_is_that_of_the_mean_over_all_loss_tokens():
    t = trainer("full", batch_size=1, grad_accum=3, steps=1, clip=0.0, schedule="constant", warmup=0)
    _, _, rows = next(t.data.from_position(0, 0, 3))
    batches = list(t.data.batches(rows, 1))
    plain = llama()
    total = sum(t.task.loss(plain, b) for b in batches) / sum(t.task.terms(b) for b in batches)
    total.backward()
    t.fit()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(t.tuner.named_trained()[name].grad, parameter.grad, rtol=1e-4, atol=5e-7)


@pytest.mark.parametrize("recipe", ["full", "lora(r=4)", "lora(r=4) + lisa(layers=1, interval=2)", "mezo"])
def test_the_loss_falls(recipe):
    losses = []
    t = trainer(recipe, steps=30, lr=2e-3 if recipe == "mezo" else 1e-2, data=packed(4))
    t.on_step = lambda record: losses.append(record.get("loss"))
    t.fit()
    losses = [x for x in losses if x]
    assert sum(losses[-5:]) / 5 < losses[0] - (0.02 if recipe == "mezo" else 0.5)


def test_schedules():
    rise = learning_rate_factor("cosine", 4, 20)
    assert [rise(i) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0] and abs(rise(20)) < 1e-9
    assert learning_rate_factor("linear", 0.5, 20)(15) == 0.5
    assert learning_rate_factor("constant", 0, 20)(19) == 1.0
    t = trainer(steps=6, warmup=2, schedule="linear", lr=1.0, clip=1e-9)
    rates = []
    t.on_step = lambda record: rates.append(record.get("lr"))
    t.fit()
    assert [r for r in rates if r is not None] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_methods_are_told_the_last_micro_batch_of_a_step():
    t = trainer("full", batch_size=1, grad_accum=3, steps=2)
    seen, backward = [], t.tuner.backward
    t.tuner.backward = lambda *args, last: (seen.append(last), backward(*args, last=last))[1]
    t.fit()
    assert seen == [False, False, True] * 2


def test_clipping_bounds_the_gradient():
    t = trainer("full", steps=1, clip=0.01)
    step, norms = t.optimizer.step, []
    grads = lambda: [p.grad for p in t.tuner.named_trained().values() if p.grad is not None]  # noqa: E731
    t.scheduler.step = lambda: None
    t.optimizer.step = lambda: (norms.append(float(torch.cat([g.flatten() for g in grads()]).norm())), step())
    t.fit()
    assert norms[0] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "mixed"])
def test_bfloat16(dtype):
    model = llama().to(torch.bfloat16) if dtype == "bf16" else llama()
    seen = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    t = trainer("lora(r=4)", model=model, dtype=dtype, steps=3)
    t.fit()
    assert set(seen) == {torch.bfloat16}
    assert model.lm_head.weight.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)


def test_evaluation_is_the_mean_over_terms_and_draws_nothing():
    t = trainer()
    before = torch.get_rng_state()
    rows = t.data.rows(0)
    result = evaluate(t.model, t.data.batches(rows, 3), t.task, t.device)
    batches = list(t.data.batches(rows, 1))
    expected = sum(float(t.task.loss(t.model, b).detach()) for b in batches) / sum(t.task.terms(b) for b in batches)
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert torch.equal(before, torch.get_rng_state()) and t.model.training


def test_any_module_with_a_loss(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = (x @ torch.randn(6, 1)).squeeze(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    data = Data(list(range(64)), lambda rows: {"i": torch.tensor([row[0] for row in rows])})
    task = Task(lambda m, b: (m(x[b["i"]]).squeeze(1) - y[b["i"]]).square().sum(), terms=lambda b: len(b["i"]))
    config = TrainConfig(steps=60, batch_size=16, lr=2e-2, save_every=0)
    losses = []
    t = Trainer(efftune.apply(model, "full"), config, data, task=task, on_step=lambda r: losses.append(r))
    t.eval_data = data
    result = t.fit()
    assert result["eval_loss"] < 0.3 * losses[0]["eval_loss"]


class Breaks(nn.Module):
    def __init__(self, inner, at, where):
        super().__init__()
        self.inner, self.at, self.where, self.calls = inner, at, where, 0

    def forward(self, x):
        self.calls += 1
        y = self.inner(x)
        if self.calls <= self.at:
            return y
        if self.where == "forward":
            return y * math.nan
        return _BadGradient.apply(y)


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * math.inf


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_bad_number_is_reported_at_its_source(tmp_path, where):
    model = llama()
    model.model.layers[1].mlp = Breaks(model.model.layers[1].mlp, 5, where)
    t = trainer("full", run=tmp_path / "run", model=model, steps=10, save_every=2)
    before = {}

    def remember(record):
        before.update(weights(t))

    t.on_step = remember
    with pytest.raises(NonFinite) as caught:
        t.fit()
    sentence = str(caught.value)
    assert ("The loss" if where == "forward" else "The gradient") in sentence and "at step 5" in sentence
    assert "'model.layers.1.mlp' (Breaks)" in sentence and "step-00000004" in sentence
    for name, tensor in weights(t).items():  # nothing was applied
        assert torch.equal(tensor, before[name])


def test_a_bad_loss_function_is_named(tmp_path):
    t = trainer("full", steps=2, task=Task(lambda m, b: m(b["input_ids"]).logits.sum() * math.nan))
    with pytest.raises(NonFinite, match=r"first appears in the loss function; there is no checkpoint before it"):
        t.fit()
    bad_root = Task(lambda m, b: (m(b["input_ids"]).logits.sum() * 0).sqrt())
    with pytest.raises(NonFinite, match="in the gradient of the loss function"):
        trainer("full", steps=2, task=bad_root).fit()


def test_metrics_hold_every_step(tmp_path):
    t = trainer(run=tmp_path / "run", steps=5)
    t.eval_data = packed(6)
    t.config.eval_every = 2
    t.fit()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 2, 4, 5]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "memory", "memory_peak", "epoch"} <= set(records[1])


def test_a_full_disk_stops_the_metrics_in_one_sentence(tmp_path, monkeypatch):
    run = RunDir(tmp_path, False)
    with pytest.raises(EfftuneError, match="cannot be written"):
        run.metrics = tmp_path / "no" / "such" / "folder"
        run.log({"step": 1})


def test_what_is_in_evaluation_mode_stays_so(tokenizer):
    from efftune.train.batches import separates_documents
    from efftune.train.models import sampler

    t = trainer(steps=1)
    frozen = t.model.model.layers[0]
    frozen.eval()
    expected = {name: module.training for name, module in t.model.named_modules()}
    assert True in expected.values() and False in expected.values()

    evaluate(t.model, t.data.batches(t.data.rows(0)[:1], 1), t.task, t.device)
    sampler(tokenizer, [5, 6], 2, 0)(t.model)
    separates_documents(t.model)
    t.eval_data = t.data
    t.fit()
    assert {name: module.training for name, module in t.model.named_modules()} == expected

    broken = Task(lambda m, b: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(t.model, t.data.batches(t.data.rows(0)[:1], 1), broken, t.device)
    assert {name: module.training for name, module in t.model.named_modules()} == expected


def test_a_model_in_evaluation_mode_is_put_into_training_mode():
    t = trainer(steps=1, model=llama().eval())
    t.fit()
    assert all(module.training for module in t.model.modules())


def test_rows_that_are_left_out_are_counted(tmp_path, capsys):
    recipe = "full + stagefilter(window=2)"
    t = trainer(recipe, run=tmp_path / "run", batch_size=2, grad_accum=2, steps=20, lr=1e-2)
    t.fit()
    steps = [r for r in t.run.records() if "loss" in r]
    names = ["rows_trained", "rows_forward_only", "rows_not_run"]
    first, last = [[r[name] for name in names] for r in (steps[0], steps[-1])]
    rows = [sum(r[name] for name in names) for r in steps]
    assert first == [4, 0, 0] and rows == sorted(rows) and last[1] > 0
    assert last == t.tuner.run.states["stagefilter"].done
    assert all(r["tokens"] > 0 for r in steps)  # what is read, whatever trains
    printed = capsys.readouterr().out
    assert (
        f"tokens read/s, {last[1]:,} rows forward only, {last[2]:,} rows not run, {last[0]:,} rows trained" in printed
    )
    assert f"stagefilter: {last[0]} rows trained" in t.tuner.reports()[0]
    plain = trainer("full", run=tmp_path / "plain", steps=1)
    plain.fit()
    assert not any(name in r for r in plain.run.records() for name in names)
