"""Trains a plain nn.Module with the trainer: a loss that is a sum, the number of its terms, and a collate function.

python examples/any_module.py OUT_DIR
"""

import sys
from pathlib import Path

import torch
from torch import nn

import efftune
from efftune.train.batches import Data
from efftune.train.config import TrainConfig
from efftune.train.loop import Trainer
from efftune.train.rundir import RunDir
from efftune.train.task import Task


def main(out: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1024, 3)
    y = torch.sin(x.sum(1))
    model = nn.Sequential(nn.Linear(3, 256), nn.Tanh(), nn.Linear(256, 1))

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        return (model(batch["x"]).squeeze(1) - batch["y"]).square().sum()

    def collate(rows: list) -> dict:
        chosen = torch.tensor([row[0] for row in rows])
        return {"x": x[chosen], "y": y[chosen]}

    train, held_out = Data(list(range(960)), collate), Data(list(range(960, 1024)), collate)
    resumed = (out / "checkpoints").exists()
    out.mkdir(parents=True, exist_ok=True)
    tuner = efftune.apply(model, "full")
    config = TrainConfig(epochs=20, batch_size=32, lr=1e-2, eval_every=100)
    task = Task(loss, terms=lambda batch: len(batch["y"]))
    trainer = Trainer(tuner, config, train, task=task, eval_data=held_out, run=RunDir(out, resumed))
    print(trainer.fit())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
