"""w += a z from a seed, against torch's normal_ into a buffer and add_, and against a plain copy. Then w += Σ a_k z_k
for 64 seeds in one call, against 64 calls and against drawing the numbers alone.

python -m bench.perturb [--device cpu|cuda] [--elements N] [--seeds]

--seeds: the second part alone. "Drawing alone" is what the C++ kernel's generator costs: the same numbers, in the same
tiles, on as many threads, into a buffer of 8 KB that stays in the first-level cache; no weight is read or written. The
GPU kernels draw into registers, and there is no such row.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.harness import Job, measure, on_backends, parsed, parser, run
from efftune import perturb_
from efftune.ops._available import dtype_name, extension
from efftune.ops.perturb import perturb_op

SEEDS = list(range(64))


def rows_for(device: str, dtype: torch.dtype, n: int) -> list[dict]:
    w, other = torch.zeros(n, dtype=dtype, device=device), torch.zeros(n, dtype=dtype, device=device)
    buffer, generator = torch.empty_like(w), torch.Generator("cpu" if device == "meta" else device)

    def torch_eager(new_buffer):
        generator.manual_seed(1)
        z = torch.empty_like(w) if new_buffer else buffer
        w.add_(z.normal_(generator=generator), alpha=1e-3)

    @torch.compile
    def torch_compiled(w):
        return w.add_(torch.randn_like(w), alpha=1e-3)

    def ours(suffix="", **options):
        call = partial(perturb_, w, 1e-3, seed=1, stream=1, **options)
        return on_backends(perturb_op, device, call, "efftune {}" + suffix)

    variants = {
        "torch, kept buffer": lambda: torch_eager(False),
        "torch, new buffer": lambda: torch_eager(True),
        "torch.compile": lambda: torch_compiled(w),
    }
    variants |= ours() | ours(", ±1", dist="rademacher")
    if dtype != torch.float32:
        variants |= ours(", stochastic", rounding="stochastic")
    variants["copy"] = lambda: w.copy_(other)
    name = f"perturb {dtype_name(dtype)} {n >> 20}M {device}"
    repeats = 7 if device == "cpu" else 30
    return run(name, variants, device=device, bytes=2 * w.nbytes, baseline="torch, kept buffer", repeats=repeats)


def rows_for_seeds(device: str, dtype: torch.dtype, n: int, dist: str) -> list[dict]:
    w, a = torch.zeros(n, dtype=dtype, device=device), torch.full((len(SEEDS),), 1e-3, device=device)
    rounding = "nearest" if dtype == torch.float32 else "stochastic"
    options = dict(stream=1, dist=dist, rounding=rounding)

    def calls():
        for k, seed in enumerate(SEEDS):
            perturb_(w, a[k], seed=seed, **options)

    def draw():
        extension("_cpu").draw(n, SEEDS, 1, dist == "rademacher", torch.get_num_threads())

    variants = {"drawing alone": draw} if device == "cpu" else {}
    variants |= on_backends(perturb_op, device, partial(perturb_, w, a, seed=SEEDS, **options), "efftune {}, one call")
    variants |= on_backends(perturb_op, device, calls, f"efftune {{}}, {len(SEEDS)} calls")
    job = f"{len(SEEDS)} seeds {dist} {dtype_name(dtype)} {n >> 20}M {device}"
    return run(job, variants, device=device, bytes=2 * w.nbytes, repeats=9)


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--elements", type=int)
    made.add_argument("--seeds", action="store_true")
    args = parsed(made, argv)
    dtypes = (torch.float32, torch.bfloat16)
    n = args.elements or ((64 if args.device == "cpu" else 256) << 20)
    few = args.elements or ((4 if args.device == "cpu" else 256) << 20)
    jobs = [Job(f"{dtype_name(dtype)} {n}", partial(rows_for, args.device, dtype, n)) for dtype in dtypes]
    seeds = [
        Job(f"{dtype_name(dtype)} {few} {dist}", partial(rows_for_seeds, args.device, dtype, few, dist))
        for dtype in dtypes
        for dist in ("normal", "rademacher")
    ]
    try:
        if not args.seeds:
            measure(args, "perturb", jobs)
    finally:
        measure(args, "perturb-seeds", seeds)


if __name__ == "__main__":
    main()
