"""Three layers that read one tensor (q, k and v), forward + backward: frozen, with LoRA each alone, and as one.

python -m bench.group [--device cpu|cuda]

"speedup" is to the three frozen nn.Linear; its inverse is what the adapters cost. In some rows k and v are a quarter as
wide as q, as in grouped-query attention. The last row, of a small size, is all overhead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import Job, measure, parsed, parser, run
from efftune import Linear
from efftune.interop.transformers import groups
from efftune.linear import LoRA
from efftune.ops._available import dtype_name

R = 16


class Three(nn.Module):
    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.q, self.k, self.v = layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


def step(layers: list[nn.Module], x: Tensor, dys: list[Tensor], together: bool) -> Callable[[], None]:
    module = Three(layers)
    if together:
        groups.install(module)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]

    def call() -> None:
        torch.autograd.backward(module(x), dys)
        for leaf in leaves:
            leaf.grad = None

    return call


def rows(device: str, dtype: torch.dtype, m: int, k: int, n: int, n_kv: int, repeats: int) -> list[dict]:
    rank = min(R, n_kv)
    name = f"{dtype_name(dtype)} {m}x{k}, {n} {n_kv} {n_kv} r{rank}"
    if device == "cpu" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # torch's own loops take 20 times as long for dy·W as for x·Wᵀ, beside which adapters are free.
        skipped = "skipped: this processor has no products of bfloat16 matrices"
        return [{"name": name, "variant": "all", "device": device, "skipped": skipped}]
    frozen = [nn.Linear(k, size, bias=False, device=device, dtype=dtype) for size in (n, n_kv, n_kv)]
    for layer in frozen:
        layer.requires_grad_(False)
    lora = [Linear.from_linear(layer, delta=LoRA(r=rank, lora_alpha=2 * rank)) for layer in frozen]
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    dys = [torch.randn(m, layer.out_features, device=device, dtype=dtype) for layer in frozen]
    variants = {
        "three frozen": step(frozen, x, dys, False),
        "LoRA, each alone": step(lora, x, dys, False),
        "LoRA, as one": step(lora, x, dys, True),
    }
    flops = 4 * m * k * (n + 2 * n_kv)
    return run(name, variants, device=device, dtype=dtype, flops=flops, repeats=repeats)


def main(argv: list[str] | None = None) -> None:
    args = parsed(parser(__doc__), argv)
    if args.device == "cpu":
        shapes = [(torch.bfloat16, m, 1024, 1024, n_kv, 15) for m in (2048, 256) for n_kv in (1024, 256)]
        shapes += [(torch.float32, m, 1024, 1024, n_kv, 15) for m in (2048, 256) for n_kv in (1024, 256)]
        shapes += [(torch.float32, 4, 16, 16, 16, 31)]
    else:
        shapes = [(torch.bfloat16, m, 4096, 4096, n_kv, 30) for m in (8192, 512) for n_kv in (4096, 1024)]
        shapes += [(torch.float32, 2048, 4096, 4096, 4096, 10), (torch.bfloat16, 16, 64, 64, 64, 31)]
    jobs = [
        Job(f"{dtype_name(dtype)} {m} {k} {n} {n_kv}", partial(rows, args.device, dtype, m, k, n, n_kv, repeats))
        for dtype, m, k, n, n_kv, repeats in shapes
    ]
    measure(args, "group", jobs)


if __name__ == "__main__":
    main()
