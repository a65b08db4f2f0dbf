"""Rotary embedding of q and k, forward and backward, against transformers' function; q and k are views of (B, T, H, D).

python -m bench.rotary [--device cpu|cuda]
"""

from __future__ import annotations

import argparse

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.harness import print_table, run, save
from efftune.nn.rotary import rotary

SHAPES = {"cpu": (4, 512, 16, 4, 64), "cuda": (4, 2048, 32, 8, 64)}  # B, T, heads of q, of k, D


def ours(q, k, cos, sin):
    return rotary(q, cos, sin), rotary(k, cos, sin)


def rows_for(device: str, dtype: torch.dtype) -> list[dict]:
    b, t, heads, kv_heads, d = SHAPES[device]
    projections = [torch.randn(b, t, h, d, device=device).to(dtype) for h in (heads, kv_heads)]
    q, k = (p.transpose(1, 2) for p in projections)
    gradients = [torch.randn_like(x) for x in (q, k)]
    angle = torch.outer(torch.arange(t), 10000.0 ** -torch.linspace(0, 1, d // 2)).repeat(1, 2)[None].to(device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k)]

    def backward(function):
        return lambda: torch.autograd.grad(function(*leaves, cos, sin), leaves, gradients)

    torch._dynamo.reset()
    functions = {
        "transformers": apply_rotary_pos_emb, "torch.compile": torch.compile(apply_rotary_pos_emb), "efftune": ours,
    }  # fmt: skip
    name = f"{str(dtype).removeprefix('torch.')} {b}x{t}, {heads} and {kv_heads} heads of {d} {device}"
    forwards = {label: lambda f=f: f(q, k, cos, sin) for label, f in functions.items()}
    both = {label: backward(f) for label, f in functions.items()}
    once = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
    return [
        *run(f"{name}, forward", forwards, device=device, bytes=once),
        *run(f"{name}, forward + backward", both, device=device, bytes=2 * once),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in rows_for(args.device, dtype)]
    save(rows, f"bench/results/rotary-{args.device}.json")
    print_table(rows)


if __name__ == "__main__":
    main()
