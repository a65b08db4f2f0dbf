"""Training steps of a Llama of 1.2 B parameters with random weights: seconds, tokens a second and the peak of memory of
each recipe, beside transformers and PEFT.

python -m bench.llama [--device cpu|cuda] [--dry] [--only NAME ...] [--tokens 2048] [--rows 4] [--repeats 5]

The shape of Llama-3.2-1B in bfloat16, made on the device; on a CPU a model of 5 M parameters. A step is forward, loss,
backward and AdamW (a zeroth-order recipe: its own). One model at a time, since two do not fit beside each other
everywhere, so times are not interleaved: compare large differences only. "Peak" is all that the step holds at once:
weights, gradients, the optimizer's state, and what forward and backward need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import efftune
from bench.harness import Job, kind, measure, parsed, parser, run
from efftune.train.default_job import MODEL
from efftune.train.task import causal_lm_loss

CONFIG = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {"cpu": MODEL, "cuda": CONFIG}
PEERS = ("transformers", "transformers, checkpointing", "PEFT lora(r=16)", "PEFT lora(r=16), checkpointing")
RECIPES = (
    "full", "full + mesa(bits=8)", "full + mesa(bits=4)", "full + wtacrs(ratio=0.3)", "full + recompute",
    "full + mesa(bits=8) + recompute", "full + lisa(layers=2)", "lora(r=16)", "lora(r=16) + mesa(bits=8)",
    "lora(r=16) + mesa(bits=4)", "lora(r=16) + recompute", "int8 + lora(r=16)", "int8 + lora(r=16) + mesa(bits=4)",
    "mezo", "lora(r=16) + mezo",
)  # fmt: skip


def llama(device: str, dtype: torch.dtype, config: dict | None = None) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(use_cache=False, **(config or CONFIGS[kind(device)]))
    with torch.device(device):  # 1.2 B numbers take half a minute on a CPU
        return LlamaForCausalLM._from_config(settings, dtype=dtype)


def prepared(variant: str, device: str, dtype: torch.dtype, batch: dict) -> tuple[nn.Module, object, Callable]:
    """(model, optimizer, one training step)."""
    model = llama(device, dtype).train()
    tokens = batch["input_ids"].numel()
    if variant in RECIPES:
        tuner = efftune.apply(model, variant)
        optimizer = tuner.optimizer(lr=1e-5)

        def forward_backward():
            tuner.backward(batch, causal_lm_loss, 1 / tokens)

        return tuner.model, optimizer, stepping(optimizer, forward_backward)
    if variant.startswith("PEFT"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    if variant.endswith("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if variant.startswith("PEFT"):
            model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device == "cuda")
    return model, optimizer, stepping(optimizer, lambda: model(**batch).loss.backward())


def stepping(optimizer, forward_backward: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        optimizer.zero_grad()
        forward_backward()
        optimizer.step()

    return call


@functools.cache
def size(kind: str) -> int:
    return sum(p.numel() for p in llama("meta", torch.bfloat16, CONFIGS[kind]).parameters())


def held_bytes(model: nn.Module, optimizer) -> int:
    """Bytes of weights, buffers, gradients and optimizer state between two steps, each storage once."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for state in getattr(optimizer, "state", {}).values():
        tensors += [t for t in state.values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def rows_for(variant: str, args) -> list[dict]:
    device, dtype = args.device, torch.bfloat16
    config = CONFIGS[kind(device)]
    ids = torch.randint(config["vocab_size"], (args.rows, args.tokens), device=device)
    model, optimizer, step = prepared(variant, device, dtype, {"input_ids": ids, "labels": ids})
    title = f"Llama {size(kind(device)) / 1e6:.0f} M bfloat16 {args.rows}x{args.tokens} {kind(device)}"
    (row,) = run(title, {variant: step}, device=device, dtype=dtype, repeats=args.repeats)
    if "skipped" not in row:
        row["speedup"] = None  # not interleaved
        row["tokens_per_s"] = ids.numel() / row["median_s"]
        row["peak_bytes"] += held_bytes(model, optimizer)
    return [row]


def show(rows: list[dict]) -> None:
    for row in rows:
        if "skipped" in row:
            print(f"{row['variant']:36} {row['skipped']}")
            continue
        speed = f"{row['median_s'] * 1e3:9.1f} ms (host {row['host_s'] * 1e3:.1f}) {row['tokens_per_s']:9,.0f} tokens/s"
        print(f"{row['variant']:36} {speed} {row['peak_bytes'] / 2**30:7.2f} GiB")


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", metavar="NAME", choices=(*PEERS, *RECIPES))
    options.add_argument("--rows", type=int, help="[4; on a CPU 2]")
    options.add_argument("--tokens", type=int, help="of a row [2048; on a CPU 128]")
    options.add_argument("--repeats", type=int, default=5)
    args = parsed(options, argv)
    rows, tokens = (2, 128) if args.device == "cpu" else (4, 2048)
    args.rows, args.tokens = args.rows or rows, args.tokens or tokens
    chosen = [v for v in (*PEERS, *RECIPES) if not args.only or v in args.only]
    names = {v: f"{v} {args.rows}x{args.tokens}" for v in chosen}
    measure(args, "llama", [Job(names[v], partial(rows_for, v, args)) for v in chosen], show)


if __name__ == "__main__":
    main()
