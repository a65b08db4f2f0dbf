"""Variance of the row samplers on the gradients of a real fine-tuning step: an encoder on labelled sentences.

python -m bench.samplers --data sst2_train.tsv [--model FOLDER] [--ratio 0.3] [--draws 400]

For every trained linear layer of the encoder: x and dy of one batch, E‖dW̃ - dW‖² over draws for each sampler, with the
scores ‖x_i‖·‖dy_i‖ of that batch ("true") and with those of ‖x_i‖ alone ("inputs"), as when rows are drawn in forward
and nothing is remembered. The error is read off the Gram matrix H_ij = (dy_i·dy_j)(x_i·x_j): a H a, a_i = weight_i - 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import efftune
from bench.harness import environment
from bench.sst2 import BATCH, RATES, loaded, minilm
from efftune.linear import Linear
from efftune.ops.sample_rows import row_norms, select_rows

SAMPLERS = ("systematic", "wta", "crs")


def pairs(data: str, model: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (x, dy) of one step, after a few steps of training."""
    prepared, batches = loaded(data, model)
    tuner = efftune.apply(prepared.model, "full")
    optimizer = tuner.optimizer(RATES["full"])
    for batch in batches[1:]:
        tuner.backward(batch, prepared.task.loss, 1 / BATCH)
        optimizer.step()
        optimizer.zero_grad()
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str):
        def hook(module, args, output):
            x = args[0].detach().flatten(0, -2)
            output.register_hook(lambda dy: seen.__setitem__(name, [x, dy.flatten(0, -2)]))

        return hook

    for name, module in tuner.model.named_modules():
        if isinstance(module, Linear) and ".layer." in name:
            module.register_forward_hook(watch(name))
    tuner.backward(batches[0], prepared.task.loss, 1 / BATCH)
    return {name: (x, dy) for name, (x, dy) in seen.items()}


def error(gram: Tensor, scores: Tensor, k: int, sampler: str, draws: int) -> float:
    total = 0.0
    for seed in range(draws):
        idx, weight, _ = select_rows(scores, k, torch.tensor(seed), sampler)
        a = torch.full((len(scores),), -1.0, dtype=torch.float64).index_add_(0, idx, weight.double())
        total += float(a @ gram @ a)
    return total / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--draws", type=int, default=400)
    args = parser.parse_args()
    rows, totals = [], {}
    for name, (x, dy) in pairs(args.data, args.model or minilm()).items():
        x64, dy64 = x.double(), dy.double()
        gram, k = (dy64 @ dy64.t()) * (x64 @ x64.t()), int(args.ratio * len(x))
        size = float((dy64.t() @ x64).square().sum())
        for kind, scores in (("true", row_norms(x) * row_norms(dy)), ("inputs", row_norms(x))):
            found = {sampler: error(gram, scores, k, sampler, args.draws) / size for sampler in SAMPLERS}
            rows.append({"layer": name, "scores": kind, "rows": len(x), "kept": k, **found})
            for sampler, value in found.items():
                totals[kind, sampler] = totals.get((kind, sampler), 0.0) + value
    saved = {"environment": environment("cpu"), "rows": rows}
    Path("bench/results/samplers-cpu.json").write_text(json.dumps(saved, indent=1) + "\n")
    for kind in ("true", "inputs"):
        # where the kept rows hold the whole gradient (the last layer, of which one token is read) nothing varies
        worst = max(r["systematic"] / r["wta"] for r in rows if r["scores"] == kind and r["wta"] > 1e-9)
        ratio = {s: totals[kind, s] / totals[kind, "wta"] for s in SAMPLERS}
        print(
            f"scores {kind:6}: relative to wta, over {len(rows) // 2} layers: systematic {ratio['systematic']:.2f} "
            f"(worst layer {worst:.2f}), crs {ratio['crs']:.2f}"
        )


if __name__ == "__main__":
    main()
