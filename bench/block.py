"""Blocks of a Llama, forward + backward through transformers' own classes: what backward keeps, and what a step costs.

python -m bench.block [--device cpu|cuda] [--dry] [--dtype bfloat16|float32] [--only NAME ...] [--lora]

d 1024, f 2816, 16 heads, 4 key-value heads on a CPU; the shape of a 1B Llama at 2048 tokens on a GPU. Saved bytes are
per token and layer in units of d bytes, counted by the meter as the difference of two depths.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import efftune
from bench.harness import Job, kind, measure, parsed, parser, print_table, run
from efftune.memory import meter

FULL = {
    "transformers": None, "efftune, exact": "full", "8-bit": "full + mesa(bits=8)", "4-bit": "full + mesa(bits=4)",
    "sampled": "full + wtacrs(ratio=0.3)", "4-bit, sampled": "full + mesa(bits=4) + wtacrs(ratio=0.3)",
}  # fmt: skip
LORA = {
    "PEFT": None, "efftune, exact": "lora(r=16)", "8-bit": "lora(r=16) + mesa(bits=8)",
    "4-bit": "lora(r=16) + mesa(bits=4)", "4-bit, sampled": "lora(r=16) + mesa(bits=4) + wtacrs(ratio=0.3)",
}  # fmt: skip
SHAPES = {
    "cpu": dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4),
    "cuda": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8),
}
SIZES = {"cpu": (4, 256, 2), "cuda": (4, 2048, 16)}  # rows, tokens, layers


def llama(device: str, dtype: torch.dtype, layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, num_hidden_layers=layers, max_position_embeddings=2048, use_cache=False, **SHAPES[kind(device)]
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).train()


def prepared(recipe: str | None, lora: bool, device: str, dtype: torch.dtype, layers: int, recompute=False):
    model = llama(device, dtype, layers)
    if recipe:
        efftune.apply(model, recipe)
    elif lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def step(model: nn.Module, ids: torch.Tensor):
    parameters = [p for p in model.parameters() if p.requires_grad]

    def call():
        model(input_ids=ids).logits.float().square().mean().backward()
        for p in parameters:
            p.grad = None

    return call


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    made.add_argument("--only", nargs="+")
    made.add_argument("--lora", action="store_true")
    made.add_argument("--repeats", type=int, default=9)
    args = parsed(made, argv)
    name = f"{'lora' if args.lora else 'full'} {args.dtype}"
    measure(args, f"block-{name.replace(' ', '-')}", [Job(name, lambda: rows_for(name, args))], show)


def rows_for(title: str, args: argparse.Namespace) -> list[dict]:
    dtype = getattr(torch, args.dtype)
    rows, tokens, layers = SIZES[kind(args.device)]
    ids = torch.randint(0, 256, (rows, tokens), device=args.device)
    recipes = LORA if args.lora else FULL
    chosen = {name: recipe for name, recipe in recipes.items() if not args.only or name in args.only}
    jobs = {name: (recipe, False) for name, recipe in chosen.items()}
    if not args.only:
        jobs["recompute"] = (next(iter(recipes.values())), True)

    kept = {}
    for name, (recipe, recompute) in ({} if args.dry else jobs).items():
        totals = []
        for depth in (1, 2):
            model = prepared(recipe, args.lora, args.device, dtype, depth, recompute)

            def forward(model=model):
                return model(input_ids=ids).logits.float().square().mean()

            # What checkpointing keeps goes through its own hooks, and is seen in what is allocated only.
            totals.append(
                meter.allocated(forward, args.device)[0]
                if recompute
                else meter.saved_for_backward(model, forward).total
            )
        kept[name] = (totals[1] - totals[0]) / (rows * tokens * SHAPES[kind(args.device)]["hidden_size"])

    models = {
        name: prepared(recipe, args.lora, args.device, dtype, layers, again) for name, (recipe, again) in jobs.items()
    }
    if args.device != "cpu" and not args.only:
        models["torch.compile"] = torch.compile(prepared(None, args.lora, args.device, dtype, layers))
    variants = {name: step(model, ids) for name, model in models.items()}
    title = f"{title} {rows}x{tokens}, {layers} layers"
    found = run(title, variants, device=args.device, dtype=dtype, repeats=args.repeats)
    for row in found:
        row["saved_d"] = kept.get(row["variant"])
        row["tokens_per_s"] = None if "skipped" in row else rows * tokens / row["median_s"]
    return found


def show(rows: list[dict]) -> None:
    print_table(rows)
    for row in rows:
        if row.get("saved_d") is not None and row["tokens_per_s"]:
            per_layer = f"{row['saved_d']:6.2f} d per token and layer"
            print(f"{row['variant']:16} keeps {per_layer}, {row['tokens_per_s']:,.0f} tokens/s")


if __name__ == "__main__":
    main()
