"""The loss of a language-model head, forward + backward: logits and F.cross_entropy, torch's own chunked operator, and
ours. Peak memory includes the gradient of a head that trains.

python -m bench.linear_cross_entropy [--device cpu|cuda] [--small] [--repeats N] [--first] [--only naive efftune]
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from bench.harness import Job, measure, parsed, parser, run
from efftune.ops._available import dtype_name
from efftune.ops.linear_cross_entropy import linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def naive(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def torch_chunked(hidden, weight, targets):
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def cut(**options) -> Loss:
    from cut_cross_entropy import linear_cross_entropy as cce

    return lambda hidden, weight, targets: cce(hidden, weight, targets, **options)


def losses(device: str, dtype: torch.dtype) -> dict[str, Loss]:
    found: dict[str, Loss] = {"naive": naive, "efftune": linear_cross_entropy}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # from torch 2.13 on
        found["torch chunked"] = torch_chunked
    if device != "cpu" and importlib.util.find_spec("liger_kernel"):
        found["Liger, float32 sums"] = liger()
    # Its backward takes 16 bits only, by an assertion.
    if device != "cpu" and dtype.itemsize == 2 and importlib.util.find_spec("cut_cross_entropy"):
        found["cut-cross-entropy"] = cut()
        found["cut-cross-entropy, unfiltered"] = cut(filter_eps=None)
    return found


def rows_for(
    device: str, dtype: torch.dtype, m: int, k: int, v: int, trains: bool, repeats: int, only: list[str] | None
) -> list[dict]:
    torch.manual_seed(0)
    hidden = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, k, device=device) / k**0.5).to(dtype).requires_grad_(trains)
    targets = torch.randint(v, (m,), device=device)

    def step(loss: Loss):
        def call():
            loss(hidden, weight, targets).backward()
            hidden.grad = weight.grad = None

        return call

    name = f"{dtype_name(dtype)} M {m} K {k} V {v}, head {'trained' if trains else 'frozen'}"
    variants = {label: step(loss) for label, loss in losses(device, dtype).items() if only is None or label in only}
    products = 3 if trains else 2
    rows = run(name, variants, device=device, dtype=dtype, flops=2 * products * m * k * v, repeats=repeats)
    times = {row["variant"]: row["median_s"] for row in rows if "median_s" in row}
    if {"naive", "efftune"} <= times.keys():
        print(f"{name}: efftune takes {times['efftune'] / times['naive']:.2f} x the naive head's time")
    return rows


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--small", action="store_true", help="V 32k, K 1024, 1024 tokens, for slow processors")
    made.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants alone")
    made.add_argument("--first", action="store_true", help="the first job only: bfloat16, a head that trains")
    made.add_argument("--repeats", type=int, help="of each variant (default 3 on a CPU, 10 on a GPU)")
    arguments = parsed(made, argv)
    device, repeats = arguments.device, arguments.repeats or (3 if arguments.device == "cpu" else 10)
    shape = (1024, 1024, 32768) if arguments.small else (4096, 2048, 131072)
    shapes = [(torch.bfloat16, *shape, True), (torch.bfloat16, *shape, False), (torch.float32, *shape, True)]
    if device != "cpu" and not arguments.small:
        shapes += [(torch.bfloat16, 8192, 4096, 151936, True), (torch.bfloat16, 8192, 4096, 151936, False)]
        shapes += [(torch.bfloat16, 4096, 2048, 50257, True)]  # an odd vocabulary
    shapes = shapes[:1] if arguments.first else shapes
    jobs = [
        Job(
            f"{dtype_name(dtype)} M {m} K {k} V {v} {trains}",
            partial(rows_for, device, dtype, m, k, v, trains, repeats, arguments.only),
            # weight and its gradient; the naive head holds logits in their dtype, in float32, and their gradients
            memory=2 * v * k * dtype.itemsize + 12 * m * v,
        )
        for dtype, m, k, v, trains in shapes
    ]
    measure(arguments, f"linear_cross_entropy{'-small' if arguments.small else ''}", jobs)


if __name__ == "__main__":
    main()
