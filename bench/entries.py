"""Single entries of a weight: their gradient against the dense one, their added product against that of a dense
layer, writing them into the weight, and the choice of the largest scores against torch.topk, for each density.

python -m bench.entries [--tokens M] [--threads 1]
"""

from __future__ import annotations

from functools import partial

import torch

from bench.harness import Job, measure, on_backend, parsed, parser, run
from efftune.ops._available import dtype_name
from efftune.ops.entries_grad import entries_grad
from efftune.ops.entries_linear import entries_linear, entries_linear_t
from efftune.ops.topk_entries import topk_entries


def picks(count: int, of: int, device: str) -> torch.Tensor:
    return torch.randperm(of, device=device)[:count].sort().values.int()


def gradient_rows(device: str, dtype: torch.dtype, m: int, n: int, density: float) -> list[dict]:
    g, z = (torch.randn(m, n, device=device).to(dtype) for _ in range(2))
    indices = picks(round(density * n * n), n * n, device)
    variants = {"dense": lambda: g.t() @ z, "efftune": lambda: entries_grad(g, z, indices)}
    variants["tiles"] = on_backend("torch", lambda: entries_grad(g, z, indices))
    name = f"entries_grad {dtype_name(dtype)} M {m} N {n} K {n} density {density} {device}"
    return run(name, variants, device=device, repeats=5)


def linear_rows(device: str, dtype: torch.dtype, m: int, n: int, density: float) -> list[dict]:
    x, y, w = (torch.randn(rows, n, device=device).to(dtype) for rows in (m, m, n))
    indices = picks(round(density * n * n), n * n, device)
    values = torch.randn(len(indices), device=device)
    variants = {
        "dense": lambda: x @ w.t(),
        "entries_linear": lambda: entries_linear(y, x, indices, values),
        "entries_linear_t": lambda: entries_linear_t(y, x, indices, values),
        "put into w": lambda: w.put_(indices.long(), values.to(dtype)),
    }
    name = f"entries_linear {dtype_name(dtype)} M {m} N {n} K {n} density {density} {device}"
    return run(name, variants, device=device, repeats=5)


def choice_rows(device: str, n: int, density: float) -> list[dict]:
    scores = torch.randn(n, n, device=device).abs()
    k = round(density * n * n)
    variants = {
        "torch.topk": lambda: torch.topk(scores.view(-1), k),
        "torch.topk, unsorted": lambda: torch.topk(scores.view(-1), k, sorted=False),
        "efftune": lambda: topk_entries(lambda: scores.split(n // 4), k),
    }
    return run(
        f"topk_entries {n} x {n} density {density} {device}", variants, device=device, bytes=8 * n * n, repeats=7
    )


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=2048)
    made.add_argument("--threads", type=int, help="of torch and of the kernels")
    args = parsed(made, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    jobs = []
    for dtype in (torch.float32, torch.bfloat16):
        for n in (1024, 2048) if args.device == "cpu" else (2048, 4096):
            for density in (0.001, 0.01, 0.05):
                parts = {"gradient": gradient_rows, "linear": linear_rows}
                for part, rows in parts.items():
                    name = f"{part} {dtype_name(dtype)} {args.tokens} {n} {density}"
                    jobs.append(Job(name, partial(rows, args.device, dtype, args.tokens, n, density)))
    for density in (0.01, 0.05):
        jobs.append(Job(f"choice {density}", partial(choice_rows, args.device, 4096, density)))
    measure(args, "entries", jobs)


if __name__ == "__main__":
    main()
