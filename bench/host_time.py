"""Host time of a layer's forward and backward: what Python, the dispatcher and autograd cost where the arithmetic is
next to nothing, for transformers, PEFT and ours.

python -m bench.host_time [--device cpu|cuda] [--only NAME ...] [--repeats N]

A Llama of 8 layers of width 32 on 8 tokens, one thread. Times are microseconds a layer, head and embedding included,
the median over steps in which all variants take turns. On a GPU the clock stops when the calls return, not when the
device is done. "relative" is to transformers for recipes that train all weights, to PEFT for LoRA.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import efftune
from bench.harness import DRY, Job, kind, measure, parsed, parser

LAYERS = 8
MODEL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
)  # fmt: skip
PEERS = ("transformers", "PEFT lora(r=4)")
RECIPES = (
    "full", "full + mesa(bits=8)", "full + wtacrs(ratio=0.3)", "full + recompute", "lora(r=4)",
    "lora(r=4) + mesa(bits=8)", "int8(group=32) + lora(r=4)",
)  # fmt: skip


def made(variant: str, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).to(device).train()
    if variant in RECIPES:
        efftune.apply(model, variant)
    elif variant.startswith("PEFT"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    return model


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], tuple[float, float]]:
    """A call that gives the seconds of forward and of backward."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def call() -> tuple[float, float]:
        if ids.is_cuda:
            torch.cuda.synchronize()  # an empty queue: a full one would make the calls wait
        start = time.perf_counter()
        loss = model(input_ids=ids).logits.float().square().mean()
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        for p in parameters:
            p.grad = None
        return middle - start, end - middle

    return call


def rows_for(variants: list[str], device: str, repeats: int) -> list[dict]:
    ids = torch.randint(0, MODEL["vocab_size"], (1, 8), device=device)
    calls = {variant: step(made(variant, device), ids) for variant in variants}
    title = f"host time of a layer, {kind(device)}"
    if device == DRY:
        return [{"name": title, "variant": v, "device": device, "skipped": "skipped: a dry run"} for v in variants]
    samples: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    for repeat in range(-3, repeats):
        turn = repeat % len(variants)
        for variant in variants[turn:] + variants[:turn]:
            seconds = calls[variant]()
            if repeat >= 0:  # the first calls compile and warm up
                samples[variant].append(seconds)
    rows = []
    for variant, taken in samples.items():
        forward, backward = (statistics.median(part) / LAYERS for part in zip(*taken))
        row = {"name": title, "variant": variant, "device": device}
        rows.append(row | {"forward_s": forward, "backward_s": backward})
    totals = {row["variant"]: row["forward_s"] + row["backward_s"] for row in rows}
    for row in rows:
        peer = PEERS["lora" in row["variant"]]
        row["relative"] = totals[row["variant"]] / totals[peer] if peer in totals else None
    return rows


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", metavar="NAME", help="these variants alone, beside the two peers")
    options.add_argument("--repeats", type=int, default=41)
    args = parsed(options, argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chosen = [*PEERS, *(recipe for recipe in RECIPES if not args.only or recipe in args.only)]
        measure(args, "host_time", [Job(str(chosen), partial(rows_for, chosen, args.device, args.repeats))], show)
    finally:
        torch.set_num_threads(threads)


def show(rows: list[dict]) -> None:
    print(f"{'':28} {'forward':>10} {'backward':>10} {'relative':>9}")
    for row in rows:
        if "skipped" in row:
            print(f"{row['variant']:28} {row['skipped']}")
            continue
        relative = "" if row["relative"] is None else f"{row['relative']:8.2f}x"
        times = f"{row['forward_s'] * 1e6:7.0f} us {row['backward_s'] * 1e6:7.0f} us"
        print(f"{row['variant']:28} {times} {relative:>9}")


if __name__ == "__main__":
    main()
