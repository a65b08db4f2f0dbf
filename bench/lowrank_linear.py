"""One LoRA layer, forward + backward, against the frozen linear (the floor), PEFT, and torch's own composition. And the
product alone, in each of its ways, against x·Wᵀ: a fused kernel pays from 92 % of its rate on.

python -m bench.lowrank_linear [--device cpu|cuda]
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from bench.harness import DRY, Job, kind, measure, on_backend, parsed, parser, run
from efftune import Linear
from efftune.linear import LoRA
from efftune.ops._available import dtype_name
from efftune.ops.lowrank_linear import OP, lowrank_linear

R = 16


class Composition(nn.Module):
    """LoRA as one writes it with torch's layers."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.linear = linear
        options = dict(bias=False, device=linear.weight.device, dtype=dtype)
        self.a, self.b = nn.Linear(linear.in_features, R, **options), nn.Linear(R, linear.out_features, **options)

    def forward(self, x):
        return self.linear(x) + 2.0 * self.b(self.a(x))


def with_peft(linear: nn.Linear, float32_adapters: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(copy.deepcopy(linear))
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"])
    return get_peft_model(model, config, autocast_adapter_dtype=float32_adapters).base_model.model[0]


def ways(device: str, *args) -> list[str]:
    """Backends that take these arguments of lowrank_linear on the device; in a dry run all that a GPU has."""
    return [b.name for b in OP.backends if kind(device) in b.devices and (device == DRY or b.why_not(*args) is None)]


def product_rows(device: str, dtype: torch.dtype, m: int, n: int, k: int, repeats: int) -> list[dict]:
    x, w, h, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (n, k), (m, R), (n, R)))
    variants = {"x·Wᵀ alone": lambda: F.linear(x, w)}
    variants |= {
        name: on_backend(name, lambda: lowrank_linear(x, w, h, b, None)) for name in ways(device, x, w, h, b, None)
    }
    name = f"x·Wᵀ + h·Bᵀ {dtype_name(dtype)} {m}x{n}x{k} r{R}"
    return run(name, variants, device=device, dtype=dtype, flops=2 * m * n * (k + R), repeats=repeats)


def layer_rows(device: str, dtype: torch.dtype, m: int, n: int, k: int, repeats: int) -> list[dict]:
    linear = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(m, n, device=device, dtype=dtype)
    lora = Linear.from_linear(linear, delta=LoRA(r=R, lora_alpha=2 * R))
    same = Linear.from_linear(linear, delta=LoRA(r=R, lora_alpha=2 * R, dtype=None))
    composition = Composition(linear, dtype)
    layers = {
        "frozen linear": linear,
        "efftune": lora,
        "efftune, adapters in x's dtype": same,
        "torch composition": composition,
        "torch.compile": torch.compile(composition),
        "PEFT as it comes": with_peft(linear, True),
        "PEFT, adapters in x's dtype": with_peft(linear, False),
    }
    h, b = x.detach()[:, :R].contiguous(), linear.weight[:, :R]
    forced = {f"efftune, {name}": name for name in ways(device, x, linear.weight, h, b, None)[1:]}
    layers |= dict.fromkeys(forced, lora)

    def step(label):
        layer = layers[label]
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def call():
            layer(x).backward(dy)
            for leaf in leaves:
                leaf.grad = None

        return on_backend(forced[label], call) if label in forced else call

    name = f"{dtype_name(dtype)} {m}x{n}x{k} r{R}"
    variants = {label: step(label) for label in layers}
    return run(name, variants, device=device, dtype=dtype, flops=4 * m * n * k, repeats=repeats)


def main(argv: list[str] | None = None) -> None:
    args = parsed(parser(__doc__), argv)
    device = args.device
    if device == "cpu":
        shapes = [(torch.bfloat16, 2048, 1024, 1024, 41), (torch.float32, 2048, 1024, 1024, 15)]
        shapes += [(torch.float32, 4, 16, 16, 31)]  # all overhead
    else:
        shapes = [
            (torch.bfloat16, m, n, k, 30) for m, n, k in ((8192, 4096, 4096), (2048, 4096, 4096), (8192, 11008, 4096))
        ]
        shapes += [(torch.float32, 2048, 4096, 4096, 10), (torch.bfloat16, 16, 64, 64, 31)]
    jobs = [
        Job(f"{what.__name__} {dtype_name(dtype)} {rest}", partial(what, device, dtype, *rest))
        for dtype, *rest in shapes
        for what in (product_rows, layer_rows)
    ]
    measure(args, "lowrank_linear", jobs)


if __name__ == "__main__":
    main()
