"""Error of every layer's gradient when backward keeps codes: an encoder on a batch of labelled sentences.

python -m bench.fidelity --data sst2_train.tsv [--model FOLDER] [--draws 6] [--kinds]

√(E‖g - g*‖² / ‖g*‖²) over all parameters of a layer, after five steps of training, in float32 and without dropout: with
8 bits, with 4 bits, and with 4 bits and mesa(max_error=0.1), which gives places more where it hurts. --kinds also
quantises norms, activations, attention and linear layers one kind at a time, and tries smaller groups.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch

import efftune
from bench.harness import environment
from bench.sst2 import BATCH, RATES, loaded, minilm
from efftune.linear import Exact, Linear
from efftune.linear.keep.quantized import Quantized
from efftune.memory.meter import saved_for_backward
from efftune.nn.glu import Activation
from efftune.nn.norm import LayerNorm, RMSNorm


def kind(module: torch.nn.Module) -> str:
    if isinstance(module, (LayerNorm, RMSNorm)):
        return "norms"
    return {Activation: "activations", Linear: "linear"}.get(type(module), "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model")
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--kinds", action="store_true")
    args = parser.parse_args()
    prepared, batches = loaded(args.data, args.model or minilm())
    tuner = efftune.apply(prepared.model, "full + mesa")
    optimizer, model = tuner.optimizer(RATES["full"]), tuner.model.eval()
    loss = prepared.task.loss

    def gradient() -> dict[str, torch.Tensor]:
        model.zero_grad()
        tuner.backward(batches[0], loss, 1 / BATCH)
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    with tuner.exactly():
        for batch in batches[1:]:
            tuner.backward(batch, loss, 1 / BATCH)
            optimizer.step()
            optimizer.zero_grad()
        exact = gradient()
    keeping = [module for module in model.modules() if isinstance(getattr(module, "keep", None), Exact)]

    def errors() -> dict[str, float]:
        sums: dict[str, list[float]] = {}
        for _ in range(args.draws):
            found = gradient()
            for name in exact:
                layer = re.search(r"\.layer\.(\d+)\.", name)
                where = f"layer {layer[1]}" if layer else "embeddings" if "embed" in name else "head"
                total = sums.setdefault(where, [0.0, 0.0])
                total[0] += float((found[name] - exact[name]).square().sum())
                total[1] += float(exact[name].square().sum())
        return {where: (error / size) ** 0.5 for where, (error, size) in sorted(sums.items())}

    rows: list[dict] = []

    def note(what: str) -> None:
        kept = saved_for_backward(model, lambda: loss(model, batches[0])).total
        rows.append({"what": what, "kept_bytes": kept, "errors": errors()})
        cells = "  ".join(f"{where} {value:6.1%}" for where, value in rows[-1]["errors"].items())
        print(f"{what:32} {kept / 2**20:6.1f} MiB:  {cells}", flush=True)

    def everywhere(keep: Quantized, chosen: str | None = None) -> None:
        for module in keeping:
            module.keep = keep if chosen in (None, kind(module)) else Exact()
        note(f"{chosen or 'all'}, {keep.bits} bits, groups of {keep.group}")

    with tuner.exactly():
        note("exact")
    everywhere(Quantized(8))
    everywhere(Quantized(4))
    if args.kinds:
        for group in (32, 16):
            everywhere(Quantized(4, group))
        for bits in (8, 4):
            for chosen in ("norms", "activations", "attention", "linear"):
                everywhere(Quantized(bits), chosen)
    tuner.remove()
    tuner = efftune.apply(model, "full + mesa(bits=4, max_error=0.1)")
    gradient()  # chooses
    print(tuner.summary().splitlines()[-1])
    note("4 bits, max_error 0.1")
    saved = {"environment": environment("cpu"), "rows": rows}
    Path("bench/results/fidelity-cpu.json").write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
