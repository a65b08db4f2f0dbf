"""act(gate) · up, forward and backward, against torch's two operators; gate and up are halves of one tensor.

python -m bench.glu [--device cpu|cuda] [--rows M] [--columns F]
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from bench.harness import Job, measure, on_backends, parsed, parser, run
from efftune.ops._available import dtype_name
from efftune.ops.glu import glu, glu_backward, glu_op

TORCH = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def rows_for(device: str, dtype: torch.dtype, m: int, f: int, activation: str) -> list[dict]:
    gate, up = torch.randn(m, 2 * f, device=device).to(dtype).chunk(2, dim=1)
    dy = torch.randn(m, f, device=device).to(dtype)
    act = TORCH[activation]

    def composition(gate, up):
        return act(gate) * up

    def both(function):
        leaves = [t.detach().requires_grad_() for t in (gate, up)]
        return lambda: torch.autograd.grad(function(*leaves), leaves, dy)

    def ours(backward):
        glu(gate, up, activation)
        if backward:
            glu_backward(dy, gate, up, activation)

    forwards = {"torch": composition, "torch.compile": torch.compile(composition)}
    name = f"{activation} {dtype_name(dtype)} {m} x {f} {device}"
    rows = []
    for title, backward, passes in (("forward", False, 3), ("forward + backward", True, 8)):
        variants = {
            label: both(function) if backward else lambda function=function: function(gate, up)
            for label, function in forwards.items()
        }
        variants |= on_backends(glu_op, device, partial(ours, backward))
        rows += run(f"{name}, {title}", variants, device=device, bytes=passes * dy.nbytes)
    return rows


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int)
    made.add_argument("--columns", type=int)
    args = parsed(made, argv)
    m, f = (
        args.rows or (4096 if args.device == "cpu" else 16384),
        args.columns or (2816 if args.device == "cpu" else 8192),
    )
    jobs = [
        Job(f"{activation} {dtype_name(dtype)} {m} x {f}", partial(rows_for, args.device, dtype, m, f, activation))
        for dtype in (torch.float32, torch.bfloat16)
        for activation in TORCH
    ]
    measure(args, "glu", jobs)


if __name__ == "__main__":
    main()
