"""w += a z from a seed, against torch's normal_ into a buffer and add_, and against a plain copy.

python -m bench.perturb [--device cpu|cuda] [--elements N]
"""

from __future__ import annotations

import argparse

import torch

from bench.harness import print_table, run, save
from efftune import perturb_, use_backend
from efftune.ops.perturb import perturb_op


def rows_for(device: str, dtype: torch.dtype, n: int) -> list[dict]:
    w, other = torch.zeros(n, dtype=dtype, device=device), torch.zeros(n, dtype=dtype, device=device)
    buffer, generator = torch.empty_like(w), torch.Generator(device)

    def torch_eager(new_buffer):
        generator.manual_seed(1)
        z = torch.empty_like(w) if new_buffer else buffer
        w.add_(z.normal_(generator=generator), alpha=1e-3)

    @torch.compile
    def torch_compiled(w):
        return w.add_(torch.randn_like(w), alpha=1e-3)

    def ours(backend, dist, rounding):
        def call():
            with use_backend(backend):
                perturb_(w, 1e-3, seed=1, stream=1, dist=dist, rounding=rounding)

        return call

    variants = {
        "torch, kept buffer": lambda: torch_eager(False),
        "torch, new buffer": lambda: torch_eager(True),
        "torch.compile": lambda: torch_compiled(w),
    }
    names = [b.name for b in perturb_op.backends if device in b.devices]
    for name in names:
        variants[f"efftune {name}"] = ours(name, "normal", "nearest")
        variants[f"efftune {name}, ±1"] = ours(name, "rademacher", "nearest")
        if dtype != torch.float32:
            variants[f"efftune {name}, stochastic"] = ours(name, "normal", "stochastic")
    variants["copy"] = lambda: w.copy_(other)
    name = f"perturb {str(dtype).removeprefix('torch.')} {n >> 20}M {device}"
    repeats = 7 if device == "cpu" else 30
    return run(name, variants, device=device, bytes=2 * w.nbytes, baseline="torch, kept buffer", repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--elements", type=int)
    args = parser.parse_args()
    n = args.elements or ((64 if args.device == "cpu" else 256) << 20)
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in rows_for(args.device, dtype, n)]
    save(rows, f"bench/results/perturb-{args.device}.json")
    print_table(rows)


if __name__ == "__main__":
    main()
