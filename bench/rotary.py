"""Rotary embedding of q and k, forward and backward, against transformers' function; q and k are views of (B, T, H, D).

python -m bench.rotary [--device cpu|cuda] [--in-place]

--in-place: instead, the backward pass alone, for q behind one elementwise operation, where the result is a new tensor
and where it is written over q. Writes no file.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.harness import Job, kind, measure, parsed, parser, print_table, run
from efftune.nn.rotary import rotary, rotary_pair
from efftune.ops._available import dtype_name
from efftune.ops.rotary import rotary as rotate

SHAPES = {"cpu": (4, 512, 16, 4, 64), "cuda": (4, 2048, 32, 8, 64)}  # B, T, heads of q, of k, D
DTYPES = (torch.float32, torch.bfloat16)


class InPlace(torch.autograd.Function):
    """`rotary`, written over x."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(x)
        return x.copy_(rotate(x, cos, sin))  # a pass more than a kernel in place would take

    @staticmethod
    def backward(ctx, dy):
        return rotate(dy, *ctx.saved_tensors, transposed=True), None, None


def operands(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, cos, sin."""
    b, t, heads, kv_heads, d = SHAPES[kind(device)]
    q, k = (torch.randn(b, t, h, d, device=device).to(dtype).transpose(1, 2) for h in (heads, kv_heads))
    angle = torch.outer(torch.arange(t), 10000.0 ** -torch.linspace(0, 1, d // 2)).repeat(1, 2)[None].to(device)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


def name_of(device: str, dtype: torch.dtype) -> str:
    b, t, heads, kv_heads, d = SHAPES[kind(device)]
    return f"{dtype_name(dtype)} {b}x{t}, {heads} and {kv_heads} heads of {d} {device}"


def rows_for(device: str, dtype: torch.dtype) -> list[dict]:
    q, k, cos, sin = operands(device, dtype)
    gradients = [torch.randn_like(x) for x in (q, k)]
    leaves = [x.detach().requires_grad_() for x in (q, k)]

    def backward(function):
        return lambda: torch.autograd.grad(function(*leaves, cos, sin), leaves, gradients)

    torch._dynamo.reset()
    functions = {
        "transformers": apply_rotary_pos_emb, "torch.compile": torch.compile(apply_rotary_pos_emb),
        "efftune": rotary_pair,
    }  # fmt: skip
    name = name_of(device, dtype)
    forwards = {label: lambda f=f: f(q, k, cos, sin) for label, f in functions.items()}
    both = {label: backward(f) for label, f in functions.items()}
    once = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
    return [
        *run(f"{name}, forward", forwards, device=device, bytes=once),
        *run(f"{name}, forward + backward", both, device=device, bytes=2 * once),
    ]


def in_place(device: str, dtype: torch.dtype) -> list[dict]:
    q, _, cos, sin = operands(device, dtype)
    leaf, gradient = q.transpose(1, 2).requires_grad_(), torch.randn_like(q)

    def backward(function):
        y = function((leaf * 1.0).transpose(1, 2), cos, sin)
        return lambda: torch.autograd.grad(y, leaf, gradient, retain_graph=True)

    variants = {"a new tensor": backward(rotary), "over q": backward(InPlace.apply)}
    return run(f"{name_of(device, dtype)}, backward of q", variants, device=device)


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--in-place", action="store_true")
    args = parsed(made, argv)
    if args.in_place:
        return print_table([row for dtype in DTYPES for row in in_place(args.device, dtype)])
    measure(args, "rotary", [Job(dtype_name(dtype), partial(rows_for, args.device, dtype)) for dtype in DTYPES])


if __name__ == "__main__":
    main()
