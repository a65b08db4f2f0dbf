"""A weight gradient from sampled rows, with and without the sampling itself, against the dense product gᵀx.

python -m bench.rows_grad [--device cpu|cuda] [--ratio 0.3] [--tokens M] [--width N]
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from bench.harness import Job, measure, on_backend, on_backends, parsed, parser, run
from efftune import Linear
from efftune.linear.keep.sampled import Sampled
from efftune.ops._available import dtype_name
from efftune.ops.rows_grad import rows_grad, rows_grad_op
from efftune.ops.sample_rows import SAMPLERS, sample_rows, sample_rows_op, select_rows


def gradient_rows(device: str, dtype: torch.dtype, m: int, n: int, k: int, ratio: float) -> list[dict]:
    g, x = (torch.randn(m, width, device=device).to(dtype) for width in (n, k))
    kept, seed = int(ratio * m), torch.tensor(1)
    rows, idx, weight, _ = sample_rows(x, None, kept, seed)

    @torch.compile
    def compiled(g, idx, weight, rows):
        return (g[idx].float() * weight[:, None]).to(g.dtype).t() @ rows

    def ours():
        return rows_grad(g, idx, weight, rows)

    def both():
        drawn, at, scale, _ = sample_rows(x, None, kept, seed)
        return rows_grad(g, at, scale, drawn)

    variants = {
        "dense": lambda: g.t() @ x,
        "torch": on_backend("reference", ours),
        "torch.compile": lambda: compiled(g, idx, weight, rows),
    }
    variants |= on_backends(rows_grad_op, device, ours, "rows_grad {}")
    variants["sample_rows and rows_grad"] = both
    name = f"rows_grad {dtype_name(dtype)} M {m} N {n} K {k} ratio {ratio} {device}"
    repeats = 7 if device == "cpu" else 30
    return run(name, variants, device=device, flops=2 * kept * n * k, dtype=dtype, repeats=repeats)


def sampling_rows(device: str, dtype: torch.dtype, m: int, k: int, ratio: float) -> list[dict]:
    x, factor = torch.randn(m, k, device=device).to(dtype), torch.rand(m, device=device)
    kept, seed, scores = int(ratio * m), torch.tensor(1), torch.randn(m, device=device).exp()

    def torch_crs():
        p = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) * factor
        idx = torch.multinomial(p, kept, replacement=True)
        return x[idx], idx, p.sum() / (kept * p[idx])

    variants = {"torch, crs": torch_crs, "select_rows alone": lambda: select_rows(scores, kept, seed)}
    variants |= on_backends(sample_rows_op, device, lambda: sample_rows(x, factor, kept, seed))
    for sampler in SAMPLERS[1:]:
        variants[f"efftune, {sampler}"] = lambda sampler=sampler: sample_rows(x, factor, kept, seed, sampler)
    name = f"sample_rows {dtype_name(dtype)} M {m} K {k} ratio {ratio} {device}"
    # x is read once for the norms; the rows are read again and written.
    total = x.nbytes + 2 * kept * k * x.itemsize
    return run(name, variants, device=device, bytes=total, dtype=dtype, repeats=7 if device == "cpu" else 30)


def layer_rows(device: str, dtype: torch.dtype, m: int, n: int, k: int, ratio: float) -> list[dict]:
    """A whole Linear, forward + backward with dx, exact and with sampled rows."""
    linear = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    dy = torch.randn(m, n, device=device).to(dtype)
    layers = {
        "nn.Linear": linear,
        "exact": Linear.from_linear(linear),
        "sampled in forward": Linear.from_linear(linear, keep=Sampled(ratio)),
        "sampled in backward": Linear.from_linear(linear, keep=Sampled(ratio, at="backward")),
    }

    def step(layer):
        def call():
            layer(x).backward(dy)
            x.grad = linear.weight.grad = None

        return call

    name = f"Linear {dtype_name(dtype)} M {m} N {n} K {k} ratio {ratio} {device}"
    variants = {label: step(layer) for label, layer in layers.items()}
    flops = int((4 + 2 * ratio) * m * n * k)
    return run(name, variants, device=device, flops=flops, dtype=dtype, baseline="exact", repeats=9)


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--ratio", type=float, default=0.3)
    made.add_argument("--tokens", type=int)
    made.add_argument("--width", type=int)
    args = parsed(made, argv)
    m, width = (
        args.tokens or (4096 if args.device == "cpu" else 8192),
        args.width or (1024 if args.device == "cpu" else 4096),
    )
    jobs = []
    for dtype in (torch.bfloat16, torch.float32):
        parts = {
            f"gradient of {n} x {width}": partial(gradient_rows, args.device, dtype, m, n, width, args.ratio)
            for n in (width, 16)  # a whole gradient, and that of a LoRA matrix
        }
        parts["sampling"] = partial(sampling_rows, args.device, dtype, m, width, args.ratio)
        parts["layer"] = partial(layer_rows, args.device, dtype, m, width, width, args.ratio)
        jobs += [Job(f"{dtype_name(dtype)} {m} {args.ratio} {part}", rows) for part, rows in parts.items()]
    measure(args, "rows_grad", jobs)


if __name__ == "__main__":
    main()
