"""A zeroth-order step against two forward passes of the same batch: time, and memory above the weights.

python -m bench.mezo [--device cpu|cuda] [--dtypes bfloat16,float32] [--repeats N]

On a CPU the model and batch of `efftune train` without options (5.2 M parameters, 8 x 256 tokens); on a GPU a Llama
of 1 B parameters on 2048 tokens.
"""

from __future__ import annotations

from functools import partial

import torch

import efftune
from bench.harness import Job, kind, measure, parsed, parser, run
from bench.llama import CONFIGS, llama
from efftune.train.task import causal_lm_loss

RECIPES = ("mezo", "mezo(dist='rademacher')", "sparsemezo", "mezo(momentum=0.9)", "lora(r=16) + mezo")
# On a GPU, where a model of 1 B parameters is made for each and a step in float32 is mostly the products of its forward
# passes: what else is perturbed shows in bfloat16.
FLOAT32_ON_GPU = ("mezo", "lora(r=16) + mezo")


def rows_for(device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    shape = (8, 256) if device == "cpu" else (1, 2048)
    ids = torch.randint(CONFIGS[kind(device)]["vocab_size"], shape, device=device)
    batch = {"input_ids": ids, "labels": ids}

    def two_forwards(model):
        @torch.no_grad()
        def call():
            return causal_lm_loss(model, batch) + causal_lm_loss(model, batch)

        return call

    def step(tuner, optimizer):
        def call():
            optimizer.zero_grad()
            tuner.backward(batch, causal_lm_loss)
            optimizer.step()

        return call

    variants, size = {}, 0
    for recipe in FLOAT32_ON_GPU if kind(device) == "cuda" and dtype == torch.float32 else RECIPES:
        tuner = efftune.apply(llama(device, dtype).eval(), recipe)
        if recipe == "mezo":
            size = sum(p.numel() for p in tuner.model.parameters())
            variants["two forward passes"] = two_forwards(tuner.model)
        if "lora" in recipe:
            variants["two forward passes, lora(r=16)"] = two_forwards(tuner.model)
        variants[recipe] = step(tuner, tuner.optimizer(lr=1e-7))
    name = f"{str(dtype).removeprefix('torch.')} {size / 1e6:.0f} M {device}"
    return run(name, variants, device=device, dtype=dtype, repeats=repeats)


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--dtypes", default="bfloat16,float32")
    made.add_argument("--repeats", type=int, help="[9; on a GPU 5]")
    args = parsed(made, argv)
    repeats = args.repeats or (9 if args.device == "cpu" else 5)
    jobs = [Job(name, partial(rows_for, args.device, getattr(torch, name), repeats)) for name in args.dtypes.split(",")]
    measure(args, "mezo", jobs)


if __name__ == "__main__":
    main()
