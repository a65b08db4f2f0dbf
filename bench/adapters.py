"""A layer with a LoRA, a DoRA or a HiRA, forward + backward, against the frozen linear and PEFT's: time, peak memory,
and what is kept for backward in units of the layer's input.

python -m bench.adapters [--device cpu|cuda]
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from bench.harness import DRY, Job, measure, parsed, parser, print_table, run
from efftune import Linear
from efftune.linear import Int8, LoRA
from efftune.linear.delta.dora import DoRA
from efftune.linear.delta.hira import HiRA
from efftune.memory.meter import saved_for_backward
from efftune.ops._available import dtype_name

R = 16
DELTAS = {"LoRA": LoRA(r=R), "DoRA": DoRA(r=R), "HiRA": HiRA(r=R)}


def with_peft(linear: nn.Linear, kind: str, float32_adapters: bool) -> nn.Module:
    from peft import HiraConfig, LoraConfig, get_peft_model

    config = (
        HiraConfig(r=R, target_modules=["0"])
        if kind == "HiRA"
        else LoraConfig(r=R, lora_alpha=R, target_modules=["0"], use_dora=kind == "DoRA")
    )
    model = nn.Sequential(copy.deepcopy(linear))
    return get_peft_model(model, config, autocast_adapter_dtype=float32_adapters).base_model.model[0]


def rows(device: str, dtype: torch.dtype, m: int, n: int, k: int, repeats: int) -> list[dict]:
    linear = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(m, n, device=device, dtype=dtype)
    layers: dict[str, nn.Module] = {"frozen linear": linear}
    for kind, delta in DELTAS.items():
        layers[kind] = Linear.from_linear(linear, delta=delta)
        layers[f"{kind} over int8"] = Linear.from_linear(linear, base=Int8(), delta=delta)
        layers[f"PEFT's {kind}"] = with_peft(linear, kind, True)
        if dtype != torch.float32:
            layers[f"PEFT's {kind}, adapters in x's dtype"] = with_peft(linear, kind, False)

    def step(layer):
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def call():
            layer(x).backward(dy)
            for leaf in leaves:
                leaf.grad = None

        return call

    name = f"{dtype_name(dtype)} {m}x{n}x{k} r{R}"
    variants = {label: step(layer) for label, layer in layers.items()}
    found = run(name, variants, device=device, dtype=dtype, repeats=repeats)
    for row in found:
        if device != DRY and "skipped" not in row:
            kept = saved_for_backward(layers[row["variant"]], lambda layer=layers[row["variant"]]: layer(x)).total
            row["kept"] = kept / x.nbytes
    return found


def show(found: list[dict]) -> None:
    print_table(found)
    for row in found:
        if "kept" in row:
            print(f"{row['name']}  {row['variant']}: keeps {row['kept']:.2f} of its input's size")


def main(argv: list[str] | None = None) -> None:
    args = parsed(parser(__doc__), argv)
    if args.device == "cpu":
        shapes = [
            (torch.float32, 1024, 1024, 1024, 9),
            (torch.float32, 256, 1024, 1024, 9),
            (torch.bfloat16, 256, 512, 512, 5),
        ]
    else:
        shapes = [(torch.bfloat16, m, n, k, 30) for m, n, k in ((8192, 4096, 4096), (2048, 4096, 4096))]
    jobs = [Job(f"{dtype_name(dtype)} {rest}", partial(rows, args.device, dtype, *rest)) for dtype, *rest in shapes]
    measure(args, "adapters", jobs, show)


if __name__ == "__main__":
    main()
