"""Host time of `efftune.apply` on a Llama of 1.2 B parameters without data: its plan, and its layers.

python -m bench.apply [--repeats N]
"""

from __future__ import annotations

import argparse
import time

import torch

import efftune
from efftune.tuner import planned

RECIPES = "lora(r=16)", "int8 + lora(r=16)", "full + mesa(bits=4)", "lora(r=16) + wtacrs + lisa(layers=2)", "mezo"


def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--repeats", type=int, default=5)
    repeats = made.parse_args(argv).repeats
    print(f"{'milliseconds, the least of ' + str(repeats):45} {'plan':>7} {'apply':>7}")
    for recipe in RECIPES:
        plans, applied = [], []
        for _ in range(repeats):
            fresh = model()
            started = time.perf_counter()
            planned(fresh, recipe)
            between = time.perf_counter()
            efftune.apply(fresh, recipe)
            plans.append(between - started)
            applied.append(time.perf_counter() - between)
        print(f"{recipe:45} {1e3 * min(plans):7.0f} {1e3 * min(applied):7.0f}")


if __name__ == "__main__":
    main()
