"""A run that is killed at random moments resumes, and ends as an unbroken one does."""

import json
import random
import signal
import time

import torch
from safetensors.torch import load_file
from torch import nn

import efftune
from efftune.train import checkpoint
from efftune.train.batches import Data
from efftune.train.config import TrainConfig
from efftune.train.loop import Trainer
from efftune.train.rundir import RunDir
from efftune.train.task import Task
from tests import children

STEPS = 60


def fit(run):
    """Begins the run, or resumes it."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 32), torch.randn(64, 32)
    model = nn.Sequential(nn.Linear(32, 256), nn.Dropout(0.2), nn.Tanh(), nn.Linear(256, 32))
    data = Data(list(range(64)), lambda rows: torch.tensor([row[0] for row in rows]))
    task = Task(lambda m, b: (m(x[b]) - y[b]).square().sum(), terms=len)
    resumed = run.exists()
    run.mkdir(exist_ok=True)
    config = TrainConfig(steps=STEPS, batch_size=8, save_every=1, lr=1e-2)
    Trainer(efftune.apply(model, "full"), config, data, task=task, run=RunDir(run, resumed)).fit()


def test_a_run_killed_at_any_moment_resumes(tmp_path):
    straight = children.start(fit, tmp_path / "straight")
    draw = random.Random(0)
    run = tmp_path / "run"
    kills = 0
    while kills < 4:
        process = children.start(fit, run)
        before = {p.name for p in (run / "checkpoints").glob("step-*")}
        while process.is_alive() and not {p.name for p in (run / "checkpoints").glob("step-*")} - before:
            time.sleep(0.001)
        time.sleep(0.02 * draw.random())
        process.kill()
        assert children.wait([process]) == [-signal.SIGKILL], "the run ended before it was killed four times"
        kills += 1
    assert children.wait([children.start(fit, run), straight]) == [0, 0]
    ends = [checkpoint.steps_in(tmp_path / name / "checkpoints")[-1] for name in ("run", "straight")]
    assert ends[0].name == ends[1].name == f"step-{STEPS:08d}"
    for name in (checkpoint.TRAINED, checkpoint.REST):
        ours, theirs = (load_file(end / name) for end in ends)
        assert ours.keys() == theirs.keys() and all((ours[n] == theirs[n]).all() for n in ours)
    losses = []
    for name in ("run", "straight"):
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([(r["step"], r["loss"]) for r in records if "loss" in r])
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
