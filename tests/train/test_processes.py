"""Two processes train as one does with twice the batch."""

import json
import math
import os
import subprocess
import sys
import types
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn

import efftune
from efftune import EfftuneError, cli
from efftune.train import checkpoint, processes
from efftune.train.batches import Data
from efftune.train.config import TrainConfig
from efftune.train.loop import NonFinite, Trainer
from efftune.train.run import choose_device, train
from efftune.train.rundir import RunDir
from efftune.train.task import make_task
from tests import children

from .test_run import arguments, sentence


@pytest.fixture
def options(model_folder, write, tmp_path):
    rows = [{"question": sentence(i), "answer": sentence(i + 99)} for i in range(13)]
    return {
        "model": model_folder, "data": write("train.jsonl", rows[:9]), "eval_data": write("held.jsonl", rows[9:]),
        "seq_len": 64, "steps": 6, "lr": 1e-3, "schedule": "constant", "warmup": 0, "sample_tokens": 5, "save_every": 3,
        "recipe": "lora(r=4) + mezo(eps=0.01, momentum=0.5)",
    }  # fmt: skip


def torchrun(*what):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def words(options):
    return [str(part) for part in arguments(options) if part != "True"]


def meeting(rank):
    """What torchrun tells each of two processes."""
    port = str(20_000 + os.getpid() % 20_000)
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    return {**ranks, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}


def command_to(path, options):
    """The command in this process, what it prints into the file."""
    with open(path, "w") as file, redirect_stdout(file):
        sys.exit(cli.main(words(options)))


def test_the_command_with_two_processes_and_resumed(options, tmp_path):
    """Nine rows by fours: the third step of an epoch has one row, and the second process none."""
    for name, value in options.items():
        options[name] = str(value) if isinstance(value, Path) else value
    one = train(options | {"batch_size": 4, "packing": False, "out": str(tmp_path / "one")})
    two = tmp_path / "two"
    how = {"batch_size": 2, "out": two, "steps": 3}
    done = torchrun("-m", "efftune.cli", *words(options | how | {"no_packing": True}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1 and done.stdout.count("recipe     lora") == 1  # the first's alone
    again, prints = {"resume": True, "out": two, "steps": 6}, [tmp_path / "first.txt", tmp_path / "second.txt"]
    resumed = [children.start(command_to, prints[rank], again, **meeting(rank)) for rank in (0, 1)]
    assert children.wait(resumed) == [0, 0]
    assert "".join(path.read_text() for path in prints).count("Resuming from") == 1

    names = {p.name for p in two.iterdir()}
    assert names == {p.name for p in one["out"].iterdir()} >= {"metrics.jsonl", "adapter", "checkpoints"}
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (two, one["out"])
    )
    assert [r["step"] for r in ours if "loss" in r] == [1, 2, 3, 4, 5, 6]
    for mine, other in zip([r for r in ours if "loss" in r], [r for r in theirs if "loss" in r], strict=True):
        assert mine["terms"] == other["terms"] and mine["epoch"] == other["epoch"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    found = next(r for r in ours if r.get("when") == "after" and r["step"] == 6)
    assert found["eval_loss"] == pytest.approx(one["after"]["eval_loss"], rel=1e-5)
    assert found["eval_loss"] != pytest.approx(one["before"]["eval_loss"], rel=1e-4)
    ours, theirs = (load_file(run / "adapter/adapter_model.safetensors") for run in (two, one["out"]))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)

    with pytest.raises(EfftuneError, match=r"the number of processes is another one \(2, now 1\)"):
        train({"out": str(two), "resume": True, "steps": 7})


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="where /proc names threads")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that lets go of its last tensor while the interpreter ends would abort the process."""
    (tmp_path / "script.py").write_text("""
from pathlib import Path
from efftune.train import processes

def threads():
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())

with processes.joined():
    import transformers.models.llama.modeling_llama  # which brings what would keep the group
    assert processes.gather(1) == [1, 1] and threads() > 0
assert threads() == 0
""")
    command = [sys.executable, tmp_path / "script.py"]
    both = [
        subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd(), **meeting(rank)}) for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]


class Routed(nn.Module):
    """Each row goes to one of two experts, and one without rows is not called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2))

    def forward(self, input_ids):
        to = (input_ids[:, 0] > 0).long()
        logits = torch.zeros(len(input_ids), 3)
        for e, expert in enumerate(self.experts):
            if (to == e).any():
                logits = logits.index_put(((to == e).nonzero().squeeze(1),), expert(input_ids[to == e]))
        return types.SimpleNamespace(logits=logits)


DRAW = torch.Generator().manual_seed(3)
X, Y = torch.randn(11, 4, generator=DRAW), torch.randint(0, 3, (11,), generator=DRAW)
X[:, 0] = torch.tensor([1, -1, 1, 1, -1, -1, -1, 1, 1, 1, -1])  # batches of one expert alone, and of both


def broken(logits, labels):
    return math.nan if 10 in labels else 0.5


def toy(recipe, batch_size, grad_accum=1, objective="loss", run=None, resumed=False, steps=6, bad=None):
    def collate(rows):
        chosen = torch.tensor([row[0] for row in rows])
        labels = torch.where(chosen == bad, 10, Y[chosen]) if bad is not None else Y[chosen]
        return {"input_ids": X[chosen], "labels": labels}

    tuner = efftune.apply(Routed(), recipe)
    config = TrainConfig(
        steps=steps, batch_size=batch_size, grad_accum=grad_accum, lr=3e-2, save_every=2, schedule="constant", warmup=0
    )
    data = Data(list(range(11)), collate, shuffle=False)
    task = make_task("classification", broken if bad is not None else objective)
    return Trainer(tuner, config, data, task=task, run=RunDir(run, resumed) if run else None)


SAME = {  # name -> what two processes do, and one
    "loss": ({"batch_size": 2}, {"batch_size": 4}),
    "accumulated": ({"batch_size": 1, "grad_accum": 2}, {"batch_size": 4}),
    "f1": ({"batch_size": 3, "objective": "f1"}, {"batch_size": 3, "grad_accum": 2, "objective": "f1"}),
}
RECIPES = [
    "mezo(eps=0.1, samples=2, points=1, momentum=0.5)",
    "fedkseed(eps=0.1, k=4, pro=True, interval=1, beta2=0.9)",
]


def outcome(t):
    losses = []
    t.on_step = lambda record: losses.append(record.get("loss"))
    t.fit()
    return [p.detach().clone() for p in t.model.parameters()], losses


def worker(rank, path):
    import torch.distributed.nn.functional  # noqa: F401  # before the group that it would keep

    distributed.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    with processes.joined():  # a group that there is already
        found = {(name, r): outcome(toy(r, **two)) for name, (two, _) in SAME.items() for r in RECIPES}
        run = path / "run"
        for steps in (3, 6):  # 3 is between checkpoints' steps, and the last has one
            t = toy(RECIPES[0], 2, run=run, resumed=steps == 6, steps=steps)
            t.fit()
        found["resumed"] = [p.detach() for p in t.model.parameters()], []
        for name, t in (("bad", toy("mezo", 2, bad=3)), ("gradient", toy("full", 2))):
            try:
                t.fit()
            except EfftuneError as error:
                found[name] = type(error), str(error)
        try:
            processes.first(lambda: 1 / 0)
        except ZeroDivisionError:
            found["first"] = True
    torch.save(found, path / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("two")
    (path / "run").mkdir()
    assert children.wait([children.start(worker, rank, path) for rank in (0, 1)]) == [0, 0]
    return path, [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SAME)
def test_two_equal_one(found, name, recipe):
    """Also where a process has no rows, where rows are routed, and where the metric is no sum."""
    weights, losses = outcome(toy(recipe, **SAME[name][1]))
    start = list(Routed().parameters())
    assert not any(torch.equal(p, q) for p, q in zip(weights, start, strict=True))
    for theirs, their_losses in (ranks[name, recipe] for ranks in found[1]):
        assert their_losses == pytest.approx(losses)
        for p, q in zip(weights, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # losses are sums in float32
    for p, q in zip(*(ranks[name, recipe][0] for ranks in found[1]), strict=True):
        assert torch.equal(p, q)


def test_both_resume_and_one_writes(found):
    path, ranks = found
    for p, q, r in zip(ranks[0]["loss", RECIPES[0]][0], *(r["resumed"][0] for r in ranks), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    records = [json.loads(line) for line in (path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in checkpoint.steps_in(path / "run/checkpoints")] == ["step-00000004", "step-00000006"]


def test_what_stops_one_stops_both(found):
    for rank in found[1]:
        assert rank["bad"][0] is NonFinite and "first appears in the loss function" in rank["bad"][1]
        assert rank["gradient"][0] is EfftuneError and "Gradients are not exchanged" in rank["gradient"][1]
        assert rank["first"]


def test_recipes_with_gradients_and_foreign_devices_are_refused(options, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 0)
    with pytest.raises(EfftuneError, match="--device cuda:1 and . GPUs do not do for process 0"):
        choose_device("cuda:1")
    monkeypatch.setattr(processes, "gather", lambda value: [value])
    assert cli.main(arguments(options | {"recipe": "lora(r=4)", "out": tmp_path / "run"})) == 1
    error = capsys.readouterr().err
    assert "not exchanged between processes, and the recipe 'lora(r=4)' takes them; use accelerate or Hugging" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_processes_that_do_not_find_each_other(options, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(arguments(options | {"out": tmp_path / "run"})) == 1
    error = capsys.readouterr().err
    assert "WORLD_SIZE is 2" in error and "RANK expected" in error and error.count("\n") == 1
    compare = ["compare", "--recipes", "mezo", "full", *arguments(options)[1:-2]]
    assert cli.main(compare) == 1 and "without torchrun" in capsys.readouterr().err
