"""Attention with weights, forward and backward, against the function that transformers' Llama has for it.

python -m bench.eager_attention [--device cpu|cuda] [--dtype bfloat16|float32] [--repeats 9]
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch

from bench.harness import Job, kind, measure, parsed, parser, run
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled
from efftune.nn.eager_attention import eager_attention
from efftune.ops._available import dtype_name

SHAPES = {  # B, H, Hkv, T, D
    "cpu": [(8, 12, 12, 128, 32), (4, 12, 12, 256, 64), (2, 16, 4, 512, 64), (1, 16, 4, 1024, 128)],
    "cuda": [(8, 32, 8, 1024, 64), (2, 32, 8, 2048, 128)],
}
VARIANTS = {
    "exact": {}, "8-bit": dict(keep=Quantized(8)), "sampled 0.3": dict(rows=Sampled(0.3)),
    "sampled 0.1": dict(rows=Sampled(0.1)),
}  # fmt: skip


def rows_for(device: str, dtype: torch.dtype, shape: tuple[int, ...], repeats: int) -> list[dict]:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    b, h, hkv, t, d = shape
    rows = []
    made = (torch.randn(b, t, heads, d, device=device, dtype=dtype).transpose(1, 2) for heads in (h, hkv, hkv))
    q, k, v = (x.requires_grad_() for x in made)
    mask = torch.full((1, 1, t, t), torch.finfo(dtype).min, device=device, dtype=dtype).triu(1)
    dout = torch.randn(b, t, h, d, device=device, dtype=dtype)
    module = SimpleNamespace(num_key_value_groups=h // hkv, training=True)

    def theirs(q=q, k=k, v=v, mask=mask, module=module):
        return eager_attention_forward(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5)[0]

    forwards = {"transformers": theirs}
    for name, settings in VARIANTS.items():
        forwards[name] = lambda q=q, k=k, v=v, mask=mask, s=settings: eager_attention(q, k, v, mask, **s)[0]
    kept = {name: forward() for name, forward in forwards.items()}
    name = f"{dtype_name(dtype)} B {b} H {h}/{hkv} T {t} D {d} {device}"
    for part in ("both", "backward"):
        jobs = {
            name: lambda f=forward, o=kept[name], i=(q, k, v), g=dout, again=part == "both": torch.autograd.grad(
                f() if again else o, i, g, retain_graph=not again
            )
            for name, forward in forwards.items()
        }
        jobs = jobs if part == "both" else {name: job for name, job in jobs.items() if name != "transformers"}
        # forward has two products, backward four
        flops = (12 if part == "both" else 8) * b * h * t * t * d
        rows += run(f"{name} {part}", jobs, device=device, dtype=dtype, flops=flops, repeats=repeats)
    return rows


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    made.add_argument("--repeats", type=int, default=9)
    args = parsed(made, argv)
    dtype = getattr(torch, args.dtype)
    jobs = [
        Job(str(shape), partial(rows_for, args.device, dtype, shape, args.repeats))
        for shape in SHAPES[kind(args.device)]
    ]
    measure(args, f"eager_attention-{args.dtype}", jobs)


if __name__ == "__main__":
    main()
