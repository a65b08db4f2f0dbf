"""`efftune train`: from settings to a finished run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import efftune
from efftune.errors import EfftuneError
from efftune.files import CHECKPOINTS
from efftune.memory import meter
from efftune.methods._base import ESTIMATES
from efftune.methods.zeroth_order._estimate import ZerothOrder
from efftune.random_state import set_seed
from efftune.recipe import parse
from efftune.train import checkpoint, data, default_job, models, processes, report, rundir, state
from efftune.train.batches import Data, check_packing, collate_packed, collate_padded
from efftune.train.config import TrainConfig
from efftune.train.loop import Trainer, evaluate, to_device
from efftune.train.task import Task, make_task
from efftune.train.threads import use_faster


@dataclass
class Prepared:
    """A model and the data it is to be trained on, before a recipe is applied."""

    model: nn.Module
    tokenizer: Any
    task: Task
    train: Data
    held_out: Data | None
    prompt: list[int]  # tokens that a sample continues
    labels: list[str] | None  # names of the classes
    new: list[str]  # parameters that the model's file does not hold


@processes.joined()
def train(given: dict[str, Any]) -> dict[str, Any]:
    """Trains, prints what happens, and returns the evaluations before and after and the run directory. Processes that
    torchrun has started train together; the first prints and writes.

    Args:
        given: fields of TrainConfig. The others come from the run that is resumed, from the default job where no data
            is given, or from TrainConfig.
    """
    out = processes.first(lambda: rundir.choose(given.get("out"), given.get("resume", False)))
    config = settings(given, out)
    set_seed(config.seed)

    prepared = prepare(config)
    plain = None if config.resume else memory_of_plain(prepared, config)
    set_seed(config.seed)
    tuner = efftune.apply(prepared.model, config.recipe, config.blocks)
    check_new_parts(tuner, prepared.new)
    choose_threads(tuner.model, prepared, config)
    if not config.resume:  # not before: what is refused up to here leaves no directory behind
        out = processes.first(lambda: rundir.create(out, numbered=not given.get("out")))
        config.out = str(out)
    held_out = len(prepared.held_out.examples) if prepared.held_out else 0
    print(f"{out}: {len(prepared.train.examples):,} examples, {held_out:,} held out\n{tuner.summary()}")

    sample = None
    if prepared.labels is None and config.sample_tokens:
        sample = models.sampler(prepared.tokenizer, prepared.prompt, config.sample_tokens, config.seed)
    run = rundir.RunDir(out, config.resume, config.tensorboard)
    trainer = Trainer(
        tuner, config, prepared.train, task=prepared.task, eval_data=prepared.held_out, run=run, sample=sample
    )
    if config.resume:
        trainer.resume(run)  # first: a refused one leaves the directory as it was
    with rundir.writing(out):
        processes.first(lambda: config.save(out / "config.json", prepared.labels))
    if plain is not None:
        trainer.log({"step": 0, "when": "plain", **plain})
    after = trainer.fit()
    with rundir.writing(out):
        processes.first(lambda: tuner.save(run.adapter))
        processes.first(lambda: report.write(run, dataclasses.asdict(config), tuner.summary()))
    before = run.find("before") or {}
    show(before, after, out, tuner.reports())
    return {"before": before, "after": after, "out": out}


def settings(given: dict[str, Any], out: Path) -> TrainConfig:
    saved = out / "config.json"
    if given.get("resume") and saved.exists():
        given = {**TrainConfig.load_settings(saved)[0], **given}
    else:
        job = default_job.SETTINGS if not given.get("data") else {}
        recipe = {"recipe": TrainConfig.recipe, **job, **given}["recipe"]
        suggested = next((rate for m in parse(recipe) if (rate := m.learning_rate) is not None), None)
        if suggested is not None:
            job = job | {"lr": default_job.ZEROTH_ORDER_RATE if job else suggested}
        given = {**job, **given}
    config = TrainConfig(**{**given, "out": str(out)})
    if config.model and not config.data:
        raise EfftuneError("--model needs --data: give the file to train on.")
    file, _, function = config.objective.rpartition(":")
    if file.endswith(".py"):
        config.objective = f"{Path(file).absolute()}:{function}"  # as a resumed run finds it, wherever it is started
    check_gradients(config)
    return config


def check_gradients(config: TrainConfig) -> None:
    """Raises: EfftuneError where the recipe takes gradients and there are none, or they would not be exchanged."""
    if isinstance(next((m for m in parse(config.recipe) if m.place == ESTIMATES), None), ZerothOrder):
        return
    if config.objective != "loss":
        raise EfftuneError(
            f"--objective {config.objective} has no gradient, and the recipe '{config.recipe}' takes one; use a "
            "zeroth-order recipe such as 'lora(r=16) + mezo', or --objective loss."
        )
    if processes.world() > 1:
        raise processes.no_gradients(f"the recipe '{config.recipe}'")


def prepare(config: TrainConfig) -> Prepared:
    """Loads model, tokenizer and data as the settings say. Raises: EfftuneError for what does not fit together."""
    train_file, eval_file = config.data, config.eval_data
    if train_file is None:
        train_file, eval_file = map(str, default_job.prose())
    table = data.read_table(train_file)
    eval_table = data.read_table(eval_file) if eval_file else None
    classify = config.task == "classification" or (config.task == "auto" and table.layout == "label")
    labels = data.label_names(table) if classify else None
    task = make_task("classification" if classify else "causal-lm", config.objective)

    model, tokenizer, new = load(config, labels)
    pad_id = tokenizer.pad_token_id

    def encode(table: data.Table) -> list[data.Example]:
        if labels:
            return data.encode_labelled(table, tokenizer, config.seq_len, config.too_long, labels)
        return data.encode_lm(table, tokenizer, config.seq_len, config.too_long)

    if eval_table:
        examples, held_out = encode(table), encode(eval_table)
    else:
        examples, held_out = data.split(encode(table), config.eval_fraction)
    packing = config.packing and not classify
    if packing:
        check_packing(model)
    collate = collate_packed(pad_id) if packing else collate_padded(pad_id, classify)
    row_tokens = config.seq_len if packing else 0
    source = checkpoint.sha256(Path(train_file))
    eval_source = checkpoint.sha256(Path(eval_file)) if eval_file else source
    made = [
        Data(e, collate, config.seed, row_tokens, source=s) for e, s in ((examples, source), (held_out, eval_source))
    ]
    prompt = (
        tokenizer(config.sample_prompt)["input_ids"]
        if config.sample_prompt
        else data.prompt_of((held_out or examples)[0])
    )
    return Prepared(model, tokenizer, task, made[0], made[1] if held_out else None, prompt, labels, new)


def load(config: TrainConfig, labels: list[str] | None) -> tuple[nn.Module, Any, list[str]]:
    """(model on its device, tokenizer, names of parameters that the model's file does not hold)."""
    name = config.model or str(processes.first(default_job.small_model))
    models.check_folder(name)
    tokenizer = models.load_tokenizer(name)
    model, new = models.load_model(name, config.dtype, labels, tokenizer.pad_token_id)
    longest = models.longest_sequence(model)
    if longest and config.seq_len > longest:
        raise EfftuneError(
            f"--seq-len {config.seq_len} is more than this model allows; use --seq-len {longest} or less."
        )
    return model.to(choose_device(config.device)), tokenizer, new


def first_batch(prepared: Prepared, config: TrainConfig) -> Any:
    """The first micro-batch of the run, on the model's device."""
    rows = prepared.train.rows(0)[: config.batch_size]
    batch = next(prepared.train.batches(rows, config.batch_size))
    return to_device(batch, next(prepared.model.parameters()).device)


def memory_of_plain(prepared: Prepared, config: TrainConfig) -> dict[str, Any]:
    """Fields of `memory.Held` for plain full fine-tuning of the model, by transformers' own loss with AdamW, with the
    run's first micro-batch; or why that cannot be known."""
    batch = first_batch(prepared, config)
    inputs = {name: value for name, value in batch.items() if not name.startswith("sample_")}
    model, kind = prepared.model, next(prepared.model.parameters()).device.type
    was, mixed = model.training, config.dtype == "mixed"

    def forward(call: Callable[..., Any]) -> torch.Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=mixed):
            return call(use_cache=False).loss if prepared.labels is None else call().loss

    try:
        return dataclasses.asdict(meter.held_by_plain(model.train(), inputs, forward))
    except Exception as error:  # the model looks at values, or takes other arguments
        return {"unknown": f"{type(error).__name__}: {error}".partition("\n")[0]}
    finally:
        model.train(was)


def choose_threads(model: nn.Module, prepared: Prepared, config: TrainConfig) -> None:
    """On a CPU: the given number of threads, or one or all, whichever evaluates the first micro-batch in less time.
    That stands for a step, since it leaves no state behind and takes no memory that training would not. The number is
    kept in `config`, as the order of sums, and so a resumed run's bits, depend on it."""
    if next(model.parameters()).device.type != "cpu" or processes.world() > 1:
        return
    if config.threads is None:
        batch = first_batch(prepared, config)
        seconds = use_faster(lambda: evaluate(model, [batch], prepared.task, torch.device("cpu")))
        config.threads = torch.get_num_threads()
        if seconds:
            each = ", ".join(f"{1e3 * taken:,.0f} ms with {count}" for count, taken in seconds.items())
            print(f"CPU threads: {config.threads} (a batch takes {each}; --threads sets it)")
    torch.set_num_threads(config.threads)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if processes.world() > 1 and name.startswith("cuda"):
        local, count = processes.local_rank(), torch.cuda.device_count()
        if name != "cuda" or local >= count:
            raise EfftuneError(
                f"Each process takes a GPU of its own: --device {name} and {count} GPUs do not do for process {local}; "
                "use --device cuda and no more processes than GPUs, or --device cpu."
            )
        name = f"cuda:{local}"
        torch.cuda.set_device(name)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise EfftuneError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]}); use cpu or auto."
        ) from error


def check_new_parts(tuner: Any, new: list[str]) -> None:
    """What the model's file does not hold is random, and must train."""
    modules = {name.rpartition(".")[0] for name in tuner.named_trained()}
    for name in new:
        module = name.rpartition(".")[0]
        if not any(other == module or other.startswith(module + ".") for other in modules):
            raise EfftuneError(
                f"'{name}' is new in this model and the recipe '{tuner.recipe}' does not train it; "
                f"add full(target_modules='{module}') to the recipe."
            )


def show(before: dict[str, Any], after: dict[str, Any], out: Path, reports: list[str]) -> None:
    for name in before:
        if name.startswith("eval_") and name in after:
            title = name.replace("eval_", "held-out ", 1)
            print(f"{title:<18} {before[name]:.4f} -> {after[name]:.4f}")
    print(*reports, sep="\n", end="\n" if reports else "")
    for title, record in (("before", before), ("after", after)):
        if record.get("sample"):
            print(f"\n--- a sample {title} ---\n{record['sample']}")
    print(f"\n{out}/report.html shows the run; {out}/adapter holds what was trained.")


def finished_settings(run: str) -> tuple[Path, TrainConfig, list[str] | None]:
    """(newest intact checkpoint, settings, names of the classes) of a run directory."""
    path = Path(run)
    if not (path / "config.json").exists():
        raise EfftuneError(f"{run} is no run directory; give one that efftune train has written.")
    settings, labels = TrainConfig.load_settings(path / "config.json")
    newest, _ = checkpoint.newest_intact(path / CHECKPOINTS)
    if newest is None:
        raise EfftuneError(f"{run} has no intact checkpoint; continue it with efftune train --out {run} --resume.")
    return newest, TrainConfig(**settings), labels


def finished(run: str) -> tuple[Any, Any]:
    """(tuner, tokenizer) of a run directory, as its newest intact checkpoint has it. The data is not read."""
    newest, config, labels = finished_settings(run)
    set_seed(config.seed)
    model, tokenizer, _ = load(config, labels)
    set_seed(config.seed)
    tuner = efftune.apply(model, config.recipe, config.blocks)
    identity = {"recipe": tuner.recipe, "base": state.base_fingerprint(tuner.model, set(tuner.named_delta()))}
    _, trained, _ = checkpoint.load(newest, identity)
    state.restore_tensors(tuner, trained)
    return tuner, tokenizer
