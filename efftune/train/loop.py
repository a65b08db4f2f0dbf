"""The training loop: compact, and the same for every recipe.

    trainer = Trainer(tuner, config, data, task=Task(loss_sum), eval_data=held_out, run=RunDir(...))
    trainer.fit()

Works on any nn.Module with a loss; `efftune.train.run` feeds it Hugging Face models and files.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from efftune.errors import EfftuneError
from efftune.memory.meter import Held, counting, held
from efftune.modes import evaluation_mode
from efftune.optim.contract import Optimizer
from efftune.optim.zeroth_order import ZerothOrderSGD
from efftune.random_state import generator_states, restore_generators
from efftune.train import checkpoint, meter, processes, state
from efftune.train.batches import Data
from efftune.train.config import TrainConfig
from efftune.train.nonfinite import NOT_AGAIN, locate
from efftune.train.rundir import RunDir
from efftune.train.task import Task, autocast

# Settings that a resumed run keeps, beside recipe, base model, data and seed; see Trainer.resume.
FIXED = (
    "objective", "eval_fraction", "seq_len", "too_long", "packing", "batch_size", "grad_accum", "lr", "schedule",
    "warmup", "weight_decay", "clip", "dtype", "blocks",
)  # fmt: skip


class NonFinite(EfftuneError):
    pass


def to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        # sample_ids and sample_spans are read on the host: on a GPU that would wait for it
        return {n: v if str(n).startswith("sample_") else to_device(v, device) for n, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def tokens(batches: list[Any]) -> int:
    """Input tokens that are read, padding included, whatever a method leaves out of them (`Tuner.counts` has that); 0
    for batches of something else."""
    return sum(batch["input_ids"].numel() for batch in batches if isinstance(batch, dict) and "input_ids" in batch)


def summed(of_each: list[tuple[int, dict[str, int]]]) -> tuple[int, dict[str, int]]:
    """Sums the tokens and the methods' counts over all processes."""
    names = {name for _, counts in of_each for name in counts}
    total = {name: sum(counts.get(name, 0) for _, counts in of_each) for name in sorted(names)}
    return sum(count for count, _ in of_each), total


def learning_rate_factor(schedule: str, warmup: float, total: int) -> Callable[[int], float]:
    """Step -> factor of the peak rate: linear warm-up, then cosine or linear to 0 at `total`, or constant."""
    rise = int(warmup if warmup >= 1 else warmup * total)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        if schedule == "constant":
            return 1.0
        done = min(1.0, (step - rise) / max(1, total - rise))
        return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Any], task: Task, device: torch.device) -> dict[str, float]:
    """Means over all terms of the batches: eval_loss, and eval_accuracy for classification; and the task's metric, if
    it has one. Draws no random numbers."""
    sums: dict[str, float] = {}
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    terms = 0
    with evaluation_mode(model), torch.random.fork_rng():
        for batch in batches:
            found = task.sums(model, to_device(batch, device))
            if task.whole:
                rows.append((found.pop("logits"), found.pop("labels")))
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            terms += task.terms(batch)
    means = {name: value / max(1, terms) for name, value in sums.items()}
    if task.whole and rows:
        name, metric = task.whole
        means[name] = float(metric(*(torch.cat(parts) for parts in zip(*rows, strict=True))))
    return {f"eval_{name}": value for name, value in means.items()}


def train_step(
    tuner: Any, optimizer: Any, scheduler: Any, batches: list[Any], task: Task, step: int, clip: float
) -> dict[str, Any]:
    """One optimizer step over all micro-batches; returns its mean loss, gradient norm, learning rate and loss terms.

    Of several processes each has the same number of micro-batches, some of which may be None, and the same result.
    Raises: NonFinite, before the optimizer touches anything, when loss or gradient is NaN or Inf.
    """
    terms = sum(processes.gather(sum(task.terms(batch) for batch in batches if batch is not None)))
    generators = generator_states()

    def backward(loss: Callable[[nn.Module, Any], torch.Tensor]) -> torch.Tensor:
        last = [False] * (len(batches) - 1) + [True]
        losses = [tuner.backward(b, loss, 1.0 / max(1, terms), last=end) for b, end in zip(batches, last, strict=True)]
        return torch.stack(losses).sum()

    optimizer.zero_grad(set_to_none=True)
    loss = float(backward(processes.everywhere(task.loss)))
    gradients = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # Zeroth-order methods leave no gradients and have no norm.
    limits = isinstance(optimizer, Optimizer) and optimizer.clips
    norm = float(nn.utils.clip_grad_norm_(gradients, math.inf if limits else clip or math.inf)) if gradients else None
    if not math.isfinite(loss) or not math.isfinite(norm or 0.0):
        what = "loss" if not math.isfinite(loss) else "gradient"
        restore_generators(generators)
        found = processes.gather(locate(tuner.model, lambda: backward(processes.zero_without_batch(task.loss))))
        where = next((sentence for sentence in found if sentence != NOT_AGAIN), NOT_AGAIN)
        raise NonFinite(f"The {what} is NaN or Inf at step {step}: {where}")
    if isinstance(optimizer, ZerothOrderSGD):
        processes.share_used(optimizer)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.step()  # the tuner's hooks run inside it
    scheduler.step()
    return {"loss": loss / max(1, terms), "grad_norm": norm, "lr": lr, "terms": terms}


class Trainer:
    """Trains what `tuner` says on `data`, and keeps a run directory if it is given one.

    With torch.distributed each process takes its part of a step's micro-batches: W processes with batch_size b and
    grad_accum g train as one does with grad_accum W·g, and, where the loss is a sum over rows, as one with batch_size
    W·b, up to the rounding of sums. All evaluate; the first alone writes. Only zeroth-order recipes do this.

    Args:
        tuner: from `efftune.apply`, its model on the device it is to train on.
        data: examples and their collate; `task` gives the loss as a sum, and how many terms it has.
        sample: model -> text, shown before and after training.
    """

    def __init__(
        self,
        tuner: Any,
        config: TrainConfig,
        data: Data,
        *,
        task: Task,
        eval_data: Data | None = None,
        run: RunDir | None = None,
        sample: Callable[[nn.Module], str] | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.tuner, self.config, self.data, self.eval_data = tuner, config, data, eval_data
        self.model, self.run, self.sample, self.on_step = tuner.model, run, sample, on_step
        self.device = next(self.model.parameters()).device
        self.task = autocast(task, self.device.type) if config.dtype == "mixed" else task
        self.rows_per_step = config.batch_size * config.grad_accum * processes.world()
        self.total = config.steps or data.steps(self.rows_per_step, config.epochs)
        self.optimizer = tuner.optimizer(config.lr, weight_decay=config.weight_decay)
        if isinstance(self.optimizer, Optimizer) and self.optimizer.clips:
            self.optimizer.max_norm = config.clip
        elif isinstance(self.optimizer, Optimizer) and self.optimizer.in_backward and config.clip:
            raise EfftuneError(
                f"--clip {config.clip} needs the gradient of all parameters at once, and "
                f"{type(self.optimizer).__name__} takes each as backward has it; use --clip 0."
            )
        factor = learning_rate_factor(config.schedule, config.warmup, self.total)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.step, self.epoch, self.row, self.seconds = 0, 0, 0, 0.0
        self.watch = state.Watch(self.model)
        base = state.base_fingerprint(self.model, set(tuner.named_delta())) if run else ""
        self.identity = {"recipe": str(tuner.recipe), "base": base, "data": data.source, "seed": data.seed}
        self.identity |= {"processes": processes.world()}
        self.identity |= {"eval_data": eval_data.source if eval_data else ""}
        self.identity |= {name: getattr(config, name) for name in FIXED}

    def fit(self) -> dict[str, Any]:
        """Trains to the end and returns the last evaluation. A resumed run goes on where its checkpoint stands."""
        run, config = self.run, self.config
        if run and run.resumed and not self.step:
            self.resume(run)
        if self.step == 0 and not (run and run.find("before")):
            self.log({"step": 0, "when": "before", **self.assess()})
        if not self.model.training:  # else what is in eval() inside it is meant to be
            self.model.train()
        with meter.Progress(self.total, self.step) as progress:
            position = self.data.from_position(self.epoch, self.row, self.rows_per_step)
            while self.step < self.total:
                started = time.perf_counter()
                meter.reset_peak(self.device)
                self.epoch, self.row, rows = next(position)
                batches = self.batches_of(rows)
                record, held = self._train_step(batches)
                self.step += 1
                taken = time.perf_counter() - started
                self.seconds += taken
                count, counts = summed(processes.gather((tokens(batches), self.tuner.counts())))
                record |= {"epoch": self.epoch, "tokens": count, "tokens_per_s": count / taken, "seconds": self.seconds}
                self.log({"step": self.step, **record, **counts, **meter.memory(self.device)})
                if held:
                    self.log({"step": self.step, "when": "memory", **dataclasses.asdict(held)})
                progress.update(record, counts)
                at_end = self.step == self.total
                if config.eval_every and self.step % config.eval_every == 0 and not at_end and self.eval_data:
                    result = {"step": self.step, **self.evaluate(self.eval_data)}
                    self.log(result)
                    progress.write(meter.line(result))
                if run and (at_end or (config.save_every and self.step % config.save_every == 0)):
                    processes.first(lambda: self.save(run))
        result = {"step": self.step, "when": "after", **self.assess()}
        if not (run and run.find("after", self.step)):
            self.log(result)
        return result

    def batches_of(self, rows: list[list[int]]) -> list[Any]:
        """The process's part of a step's micro-batches, on the device, and None where another process has one more."""
        size = self.config.batch_size
        starts = range(0, len(rows), size)
        mine = starts[processes.rank() :: processes.world()]
        made = [to_device(b, self.device) for at in mine for b in self.data.batches(rows[at : at + size], size)]
        return made + [None] * (len(starts[:: processes.world()]) - len(mine))

    def _train_step(self, batches: list[Any]) -> tuple[dict[str, Any], Held | None]:
        """The step's record, and what the first step of a run holds."""
        step, task, kept = self.step, self.task, []
        first = self.run is not None and step == 0
        if first:
            task = dataclasses.replace(task, loss=counting(task.loss, kept))
        try:
            record = train_step(self.tuner, self.optimizer, self.scheduler, batches, task, step, self.config.clip)
            return record, held(self.model, self.optimizer, max(kept)) if first else None
        except NonFinite as error:
            good = checkpoint.newest_intact(self.run.checkpoints)[0] if self.run else None
            last = f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
            remedy = "lower --lr, lengthen --warmup or look at that module"
            raise NonFinite(f"{error}; {last}; {remedy}.") from None

    def evaluate(self, data: Data) -> dict[str, float]:
        rows = data.rows(0)
        rows = rows[: self.config.eval_rows or len(rows)]
        return evaluate(self.model, data.batches(rows, self.config.batch_size), self.task, self.device)

    def assess(self) -> dict[str, Any]:
        """Evaluates and draws a sample of text, before or after training."""
        result: dict[str, Any] = dict(self.evaluate(self.eval_data)) if self.eval_data else {}
        if self.sample:
            result["sample"] = self.sample(self.model)
        return result

    def log(self, record: dict[str, Any]) -> None:
        if self.run and processes.rank() == 0:
            self.run.log(record)
        if self.on_step:
            self.on_step(record)

    def save(self, run: RunDir) -> None:
        trained, rest = state.capture(self.tuner, self.optimizer, self.scheduler, self.watch)
        rest |= {"epoch": self.epoch, "row": self.row, "seconds": self.seconds}
        run.sync()  # metrics first: a checkpoint never knows of a step that they do not
        checkpoint.save(run.checkpoints, self.step, trained, rest, self.identity, self.config.keep_last)

    def resume(self, run: RunDir) -> None:
        """Goes to the newest intact checkpoint, if there is one; metrics after it are cut off.

        With the settings that the run began with, what follows is bit for bit what an unbroken run does. What decides
        which rows a step reads and how it updates may therefore not change, and is refused before anything is written.
        Steps and epochs may: the run becomes longer or shorter, and the schedule runs to its new end from here on.
        Device, evaluation, sample and checkpoint settings may too.
        """
        path, damaged = processes.first(lambda: checkpoint.newest_intact(run.checkpoints))
        for sentence in damaged:
            print(sentence)
        if path is None and damaged:
            raise EfftuneError(f"No checkpoint in {run.checkpoints} is intact; start a new run with another --out.")
        if path:
            step, trained, rest = checkpoint.load(path, self.identity)
            missing = {*state.RESTORED, "epoch", "row", "seconds"} - set(rest)
            if missing:
                raise EfftuneError(f"{path} lacks '{min(missing)}'; delete it to go on from an earlier one.")
            self.step = step
            state.restore(self.tuner, self.optimizer, self.scheduler, trained, rest)
            self.epoch, self.row, self.seconds = rest["epoch"], rest["row"], rest["seconds"]
            print(f"Resuming from {path}.")
        processes.first(lambda: run.cut_metrics(self.step))
