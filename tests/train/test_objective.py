"""Metrics as what a step minimises."""

import json
import math
import types

import pytest
import torch
from torch import nn

from efftune import EfftuneError, cli
from efftune.train import checkpoint
from efftune.train.batches import Data, collate_packed, collate_padded
from efftune.train.loop import NonFinite, evaluate
from efftune.train.run import train
from efftune.train.task import CAUSAL_LM, CLASSIFICATION, make_task

from .conftest import examples, llama, packed, trainer
from .test_run import arguments, contents, sentence

FILE = """
def margin(logits, labels):
    return float(logits.gather(1, labels[:, None]).mean() - logits.mean())

def nothing(logits, labels):
    return None

def loss(logits, labels):
    return 0.0
"""


class Table(nn.Module):
    """Logits of a row: a trained table at its first token."""

    def __init__(self, tokens, classes):
        super().__init__()
        self.table = nn.Embedding(tokens, classes)
        self.table.weight.data.normal_(generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids, attention_mask=None):
        return types.SimpleNamespace(logits=self.table(input_ids[:, 0]))


def classes(count, of, seed=0, skew=False):
    """A batch of `count` rows of `of` classes; with `skew` the last class is nobody's label."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (count, 1), generator=draw)
    return {"input_ids": tokens, "labels": torch.randint(0, of - skew, (count,), generator=draw)}


def macro_f1(predicted, labels):
    found = []
    for c in set(predicted) | set(labels):
        pairs = list(zip(predicted, labels, strict=True))
        hit = sum(p == y == c for p, y in pairs)
        found.append(2 * hit / (2 * hit + sum((p == c) != (y == c) for p, y in pairs)))
    return sum(found) / len(found)


@pytest.mark.parametrize("of, skew", [(2, False), (4, True)])
@torch.no_grad()
def test_the_named_metrics_are_those_of_the_definition(of, skew):
    model, batch = Table(50, of), classes(40, of, skew=skew)
    predicted, labels = model(batch["input_ids"]).logits.argmax(-1).tolist(), batch["labels"].tolist()
    right = sum(p == y for p, y in zip(predicted, labels, strict=True)) / 40
    for name, expected in (("accuracy", right), ("f1", macro_f1(predicted, labels))):
        task = make_task("classification", name)
        assert float(task.loss(model, batch)) == pytest.approx(-40 * expected) and task.terms(batch) == 40
    one = {name: tensor[:1] for name, tensor in batch.items()}  # all other classes are nobody's
    assert float(make_task("classification", "f1").loss(model, one)) == -(predicted[0] == labels[0])
    assert make_task("classification") is CLASSIFICATION and make_task("causal-lm", "loss") is CAUSAL_LM


@torch.no_grad()
def test_f1_of_the_held_out_set_is_no_mean_of_batches():
    model, batch = Table(50, 3), classes(40, 3, seed=1)
    whole = macro_f1(model(batch["input_ids"]).logits.argmax(-1).tolist(), batch["labels"].tolist())
    parts = [{name: tensor[at : at + 16] for name, tensor in batch.items()} for at in (0, 16, 32)]

    def ten_times_f1(logits, labels):
        return 10 * macro_f1(logits.argmax(-1).tolist(), labels.tolist())

    found = evaluate(model, parts, make_task("classification", "f1"), torch.device("cpu"))
    assert found["eval_f1"] == pytest.approx(whole) and set(found) == {"eval_loss", "eval_accuracy", "eval_f1"}
    own = make_task("classification", ten_times_f1)
    assert evaluate(model, parts, own, torch.device("cpu"))["eval_ten_times_f1"] == pytest.approx(10 * whole)
    cut = sum(float(own.loss(model, part)) for part in parts) / -40
    assert abs(cut - 10 * whole) > 0.01  # a step's is the mean, weighted by rows
    assert evaluate(model, parts, CLASSIFICATION, torch.device("cpu")).items() <= found.items()


@pytest.mark.parametrize("packing", [True, False])
@torch.no_grad()
def test_a_metric_of_a_causal_lm_sees_what_predicts_the_labelled_tokens(packing):
    model, made = llama().eval(), examples(5)
    made[1].labels[:4] = [-100] * 4
    batch = collate_packed(1)([made]) if packing else collate_padded(1)([[example] for example in made])
    logits, labels = [], []
    for example in made:
        alone = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        for at, label in enumerate(example.labels):
            if label != -100:
                logits.append(alone[at - 1])
                labels.append(label)
    seen = []

    def metric(got, targets):
        seen.append((got, targets))
        return 0.25

    task = make_task("causal-lm", metric)
    assert float(task.loss(model, batch)) == -0.25 * len(labels) == -0.25 * task.terms(batch)
    torch.testing.assert_close(seen[0][0], torch.stack(logits), rtol=1e-5, atol=1e-5)
    assert seen[0][1].tolist() == labels
    right = sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))
    accuracy = make_task("causal-lm", "accuracy")
    found = evaluate(model, [batch], accuracy, torch.device("cpu"))
    assert found["eval_accuracy"] == pytest.approx(right / len(labels))
    assert found["eval_loss"] == pytest.approx(evaluate(model, [batch], CAUSAL_LM, torch.device("cpu"))["eval_loss"])


def test_one_times_four_is_four_times_one():
    made = []
    for batch_size, accum in ((4, 1), (1, 4)):
        settings = {"batch_size": batch_size, "grad_accum": accum, "steps": 6, "lr": 3e-2}
        t = trainer("mezo(eps=0.1)", task=make_task("causal-lm", "accuracy"), **settings)
        start = [p.detach().clone() for p in t.model.parameters()]
        t.fit()
        made.append(list(t.model.parameters()))
    assert not torch.equal(start[0], made[0][0])
    for one, four in zip(*made, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["accuracy", "f1"])
def test_training_raises_the_metric(objective):
    batch = classes(50, 3)
    batch = {"input_ids": torch.arange(50)[:, None], "labels": batch["labels"]}
    data = Data(list(range(50)), lambda rows: {n: t[[row[0] for row in rows]] for n, t in batch.items()})
    settings = {"steps": 150, "batch_size": 50, "lr": 1.0, "schedule": "constant"}
    t = trainer("mezo(eps=0.3)", model=Table(50, 3), data=data, task=make_task("classification", objective), **settings)
    before = t.evaluate(data)[f"eval_{objective}"]
    t.fit()
    assert t.evaluate(data)[f"eval_{objective}"] > before + 0.2


@pytest.fixture
def options(model_folder, write, tmp_path):
    qa = write("qa.jsonl", [{"question": sentence(i), "answer": sentence(i + 99)} for i in range(30)])
    return {
        "model": str(model_folder), "data": str(qa), "out": str(tmp_path / "run"), "seq_len": 64, "batch_size": 2,
        "steps": 2, "lr": 1e-4, "sample_tokens": 5, "recipe": "mezo(eps=0.1)",
    }  # fmt: skip


def test_a_function_in_a_file_is_fixed_on_resume_and_not_replayed(options, write, tmp_path, monkeypatch, capsys):
    file = write("metrics.py", FILE)
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments(options | {"objective": "metrics.py:margin"})) == 0
    assert "held-out margin" in capsys.readouterr().out
    run = tmp_path / "run"
    assert json.loads((run / "config.json").read_text())["objective"] == f"{file}:margin"
    monkeypatch.chdir("/")
    before = contents(run)
    resume = ["train", "--resume", "--out", str(run), "--steps", "3"]
    assert cli.main([*resume, "--objective", "accuracy"]) == 1
    error = capsys.readouterr().err
    assert f"--objective is another one ('{file}:margin', now 'accuracy')" in error and contents(run) == before
    assert cli.main(resume) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    after = next(r for r in records if r.get("when") == "after" and r["step"] == 3)
    assert {"eval_loss", "eval_margin"} <= set(after) and sum("loss" in r for r in records) == 3
    assert "held-out margin" in (run / "report.html").read_text()
    file.unlink()
    log = str(tmp_path / "run.seeds")
    assert cli.main(["export", str(run), "--seed-log", "--out", log]) == 0
    assert cli.main(["replay", options["model"], log, str(tmp_path / "again")]) == 0
    assert cli.main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0


def test_a_function_in_a_package(options):
    # torch.nn.functional.cross_entropy(logits, labels) -> a tensor with one element
    result = train(options | {"objective": "torch.nn.functional:cross_entropy", "task": "causal-lm"})
    assert result["after"]["eval_cross_entropy"] == pytest.approx(result["after"]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"objective": "acuracy"}, "no objective 'acuracy' (did you mean 'accuracy'?); it can be loss, accuracy, f1"),
        ({"objective": "nowhere.at_all:f"}, "nowhere.at_all cannot be imported (ModuleNotFoundError: No module named"),
        ({"objective": "nowhere.py:f"}, "nowhere.py cannot be imported (FileNotFoundError: [Errno 2] No such file"),
        ({"objective": "broken.py:f"}, "broken.py cannot be imported (ZeroDivisionError: division by zero)"),
        ({"objective": "metrics.py:magin"}, "no function 'magin' (did you mean 'margin'?) is there"),
        ({"objective": "metrics.py:nothing"}, "nothing returned a NoneType and no number; let it return a float"),
        ({"objective": "metrics.py:loss"}, "give it another name"),
        ({"objective": "f1"}, "f1 is a metric of classes; for causal-lm use accuracy"),
        (
            {"objective": "accuracy", "recipe": "lora(r=4)"},
            "has no gradient, and the recipe 'lora(r=4)' takes one",
        ),
        ({"objective": "accuracy", "recipe": "full + vcas + mezo"}, "has no gradient"),
        ({"objective": "accuracy", "recipe": "lora + mesa(max_error=0.1) + mezo"}, "accuracy has no gradient"),
    ],
)
def test_bad_objectives_are_one_sentence(options, write, tmp_path, monkeypatch, capsys, change, said):
    write("metrics.py", FILE)
    write("broken.py", "1 / 0")
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments(options | change)) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("efftune: "), error
    assert not checkpoint.steps_in(tmp_path / "run/checkpoints")


def test_from_python_too_a_gradient_is_refused():
    with pytest.raises(EfftuneError, match="accuracy has no gradient, and this recipe takes one"):
        trainer("full", task=make_task("causal-lm", "accuracy")).fit()
    with pytest.raises(EfftuneError, match="no kind 'clasification'"):
        make_task("clasification", "accuracy")
    with pytest.raises(EfftuneError, match="returned a Tensor and no number"), torch.no_grad():
        make_task("causal-lm", lambda logits, labels: logits).loss(llama(), next(packed().batches([[0]], 1)))


def test_a_metric_that_is_not_finite_skips_its_direction_or_stops():
    calls = iter([math.nan, 0.5])  # of the first direction one side, and nothing after it

    def shaky(logits, labels):
        return next(calls, 0.5)

    t = trainer("mezo", task=make_task("causal-lm", shaky), steps=2)
    t.fit()
    assert "directions skipped" in t.tuner.summary()
    with pytest.raises(NonFinite, match="it first appears in the loss function"):
        trainer("mezo", task=make_task("causal-lm", lambda logits, labels: math.nan), steps=2).fit()


def test_compare_shows_the_metric(options, tmp_path):
    from efftune.measure.compare import compare

    given = {**options, "objective": "accuracy", "sample_tokens": 0}
    del given["recipe"]
    rows = compare(["mezo", "lora(r=4) + mezo"], given)
    assert all(0 <= row["eval_accuracy"] <= 1 and row["train_loss"] <= 0 for row in rows)
    assert "| accuracy |" in (tmp_path / "run/compare.md").read_text()
    with pytest.raises(EfftuneError, match="has no gradient"):
        compare(["mezo", "full"], given | {"out": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists()


def test_a_batch_without_labels_says_nothing():
    task = make_task("causal-lm", "accuracy")
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.full((2, 5), -100)}
    with torch.no_grad():
        assert task.loss(llama(), batch) == 0 == task.evaluate(llama(), batch)["accuracy"]
