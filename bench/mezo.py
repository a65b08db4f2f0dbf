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

    plain = efftune.apply(llama(device, dtype).eval(), "mezo")
    variants = {"two forward passes": two_forwards(plain.model)}
    for recipe in RECIPES:
        tuner = efftune.apply(llama(device, dtype).eval(), recipe)
        if "lora" in recipe:
            variants["two forward passes, lora(r=16)"] = two_forwards(tuner.model)
        variants[recipe] = step(tuner, tuner.optimizer(lr=1e-7))
    name = (
        f"{str(dtype).removeprefix('torch.')} {sum(p.numel() for p in plain.model.parameters()) / 1e6:.0f} M {device}"
    )
    return run(name, variants, device=device, dtype=dtype, repeats=repeats)


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--dtypes", default="bfloat16,float32")
    made.add_argument("--repeats", type=int, default=9)
    args = parsed(made, argv)
    jobs = [
        Job(name, partial(rows_for, args.device, getattr(torch, name), args.repeats)) for name in args.dtypes.split(",")
    ]
    measure(args, "mezo", jobs)


if __name__ == "__main__":
    main()
