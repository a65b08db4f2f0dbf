"""w += a z from a seed, against torch's normal_ into a buffer and add_, and against a plain copy. Then w += Σ a_k z_k
for 64 seeds in one call, against 64 calls and against drawing the numbers alone.

python -m bench.perturb [--device cpu|cuda] [--elements N] [--seeds]

--seeds: the second part alone. "Drawing alone" is what the C++ kernel's generator costs: the same numbers, in the same
tiles, on as many threads, into a buffer of 8 KB that stays in the first-level cache; no weight is read or written. The
GPU kernels draw into registers, and there is no such row.
"""

from __future__ import annotations

import argparse

import torch

from bench.harness import print_table, run, save
from efftune import perturb_, use_backend
from efftune.ops._available import extension
from efftune.ops.perturb import perturb_op

SEEDS = list(range(64))


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


def rows_for_seeds(device: str, dtype: torch.dtype, n: int, dist: str) -> list[dict]:
    w, a = torch.zeros(n, dtype=dtype, device=device), torch.full((len(SEEDS),), 1e-3, device=device)
    rounding = "nearest" if dtype == torch.float32 else "stochastic"
    options = dict(stream=1, dist=dist, rounding=rounding)

    def one_call(backend):
        with use_backend(backend):
            perturb_(w, a, seed=SEEDS, **options)

    def calls(backend):
        with use_backend(backend):
            for k, seed in enumerate(SEEDS):
                perturb_(w, a[k], seed=seed, **options)

    def draw():
        extension("_cpu").draw(n, SEEDS, 1, dist == "rademacher", torch.get_num_threads())

    variants = {"drawing alone": draw} if device == "cpu" else {}
    for name in [b.name for b in perturb_op.backends if device in b.devices]:
        variants[f"efftune {name}, one call"] = lambda name=name: one_call(name)
        variants[f"efftune {name}, {len(SEEDS)} calls"] = lambda name=name: calls(name)
    job = f"{len(SEEDS)} seeds {dist} {str(dtype).removeprefix('torch.')} {n >> 20}M {device}"
    return run(job, variants, device=device, bytes=2 * w.nbytes, repeats=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--elements", type=int)
    parser.add_argument("--seeds", action="store_true")
    args = parser.parse_args()
    dtypes = (torch.float32, torch.bfloat16)
    if not args.seeds:
        n = args.elements or ((64 if args.device == "cpu" else 256) << 20)
        rows = [row for dtype in dtypes for row in rows_for(args.device, dtype, n)]
        save(rows, f"bench/results/perturb-{args.device}.json")
        print_table(rows)
    n = args.elements or ((4 if args.device == "cpu" else 256) << 20)
    jobs = [(dtype, dist) for dtype in dtypes for dist in ("normal", "rademacher")]
    rows = [row for dtype, dist in jobs for row in rows_for_seeds(args.device, dtype, n, dist)]
    save(rows, f"bench/results/perturb-seeds-{args.device}.json")
    print_table(rows)


if __name__ == "__main__":
    main()
