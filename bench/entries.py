"""Single entries of a weight: their gradient against the dense one, their added product against that of a dense
layer, writing them into the weight, the choice of the largest scores against torch.topk, and a step of AdamW, for each
density; and the entries of a low-rank approximation against those of an exact SVD.

python -m bench.entries [--tokens M] [--threads 1] [--model PATH]
"""

from __future__ import annotations

from functools import partial

import torch

from bench.harness import Job, dtypes, measure, on_backend, parsed, parser, run
from efftune.linear import Linear
from efftune.methods.sparse._scores import Matrix, truncated
from efftune.ops._available import dtype_name
from efftune.ops.entries_grad import entries_grad
from efftune.ops.entries_linear import entries_linear, entries_linear_t
from efftune.ops.topk_entries import topk_entries
from efftune.structure import blocks


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


def adamw_rows(device: str, n: int, density: float) -> list[dict]:
    """A step of AdamW for some entries, whose state is packed, against one for the whole weight."""

    def step(count: int):
        p = torch.nn.Parameter(torch.zeros(count, device=device))
        p.grad = torch.randn_like(p)
        return torch.optim.AdamW([p], lr=1e-5, fused=True).step

    variants = {"all entries": step(n * n), "these": step(round(density * n * n))}
    return run(f"AdamW {n} x {n} density {density} {device}", variants, device=device, bytes=28 * n * n, repeats=15)


def with_gap(device: str, n: int, r: int) -> torch.Tensor:
    """A matrix whose singular values have a gap behind the first r."""
    u, v = (torch.linalg.qr(torch.randn(n, n, device=device)).Q for _ in range(2))
    s = torch.linspace(1, 0.5, n, device=device)
    s[r:] /= 4
    return (u * s) @ v


def real(path: str, device: str) -> dict[str, torch.Tensor]:
    """The weights of the linear layers of the first block of a model."""
    from transformers import AutoModel

    _, stack = blocks(AutoModel.from_pretrained(path, dtype=torch.float32).to(device))
    return {n: m.weight.detach() for n, m in stack[0].named_modules() if isinstance(m, torch.nn.Linear)}


def rank_rows(device: str, name: str, w: torch.Tensor, r: int) -> list[dict]:
    """The largest entries of a rank-r approximation, by block Krylov iteration against the exact SVD, and the share of
    1 % of the entries that both pick."""
    n, k = w.shape
    layer = Linear.from_linear(torch.nn.Linear(k, n, bias=False, device=device).requires_grad_(False))
    layer.weight.data.copy_(w)
    count = round(0.01 * n * k)

    def exact():
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return ((u[:, :r] * s[:r]) @ v[:r]).abs_()

    def krylov():
        a, b = truncated(Matrix(layer, r, 0))
        return (a @ b).abs_()

    def picked(scores):
        return torch.topk(scores.flatten(), count).indices

    name = f"rank {r} of {name} {n} x {k} {device}"
    rows = run(name, {"exact SVD": exact, "block Krylov": krylov}, device=device, repeats=5)
    if "skipped" not in rows[-1]:
        rows[-1]["overlap"] = float(torch.isin(picked(exact()), picked(krylov())).double().mean())
        print(f"{name}: overlap {rows[-1]['overlap']:.4f}")
    return rows


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=2048)
    made.add_argument("--model", help="whose first block's weights are approximated as well")
    made.add_argument("--threads", type=int, help="of torch and of the kernels")
    args = parsed(made, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    jobs = []
    for dtype in dtypes(args.device):
        for n in (1024, 2048) if args.device == "cpu" else (2048, 4096):
            for density in (0.001, 0.01, 0.05):
                parts = {"gradient": gradient_rows, "linear": linear_rows}
                for part, rows in parts.items():
                    name = f"{part} {dtype_name(dtype)} {args.tokens} {n} {density}"
                    jobs.append(Job(name, partial(rows, args.device, dtype, args.tokens, n, density)))
    for density in (0.01, 0.05):
        jobs.append(Job(f"choice {density}", partial(choice_rows, args.device, 4096, density)))
        jobs.append(Job(f"adamw {density}", partial(adamw_rows, args.device, 2048, density)))
    jobs.append(Job("rank", lambda: rank_rows(args.device, "with a gap", with_gap(args.device, 1024, 64), 64)))
    if args.model:
        for name, w in real(args.model, args.device).items():
            jobs.append(Job(f"rank {name}", partial(rank_rows, args.device, name, w, 32)))
    measure(args, "entries", jobs)


if __name__ == "__main__":
    main()
