"""RMSNorm and LayerNorm, forward and backward, against torch's and against the composition in transformers' models.

python -m bench.rms_norm [--device cpu|cuda] [--rows M] [--columns K]
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from bench.harness import Job, measure, on_backends, parsed, parser, run
from efftune.ops._available import dtype_name
from efftune.ops.rms_norm import rms_norm, rms_norm_backward, rms_norm_op


def composition(x, weight, eps):
    """What LlamaRMSNorm does."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rows_for(device: str, dtype: torch.dtype, m: int, k: int, center: bool) -> list[dict]:
    x, dy = (torch.randn(m, k, device=device).to(dtype) for _ in range(2))
    weight = torch.ones(k, device=device, dtype=dtype, requires_grad=True)
    bias = torch.zeros(k, device=device, dtype=dtype, requires_grad=True) if center else None
    inputs = [t for t in (weight, bias) if t is not None]
    forwards = {
        "torch": (lambda x: F.layer_norm(x, (k,), weight, bias)) if center else lambda x: F.rms_norm(x, (k,), weight)
    }
    if not center:
        forwards["composition"] = lambda x: composition(x, weight, 1e-6)
        forwards["torch.compile"] = torch.compile(lambda x: composition(x, weight, 1e-6))

    def both(f):
        leaf = x.detach().requires_grad_()
        return lambda: torch.autograd.grad(f(leaf), (leaf, *inputs), dy)

    def no_grad(f):
        def call():
            with torch.no_grad():
                f(x)

        return call

    w, b = weight.detach(), None if bias is None else bias.detach()

    def ours(backward):
        _, mean, rstd = rms_norm(x, w, b, 1e-6, 0.0, center)
        if backward:
            rms_norm_backward(dy, x, w, mean, rstd, 0.0, True, center)

    name = f"{'layer' if center else 'rms'} norm {dtype_name(dtype)} {m} x {k} {device}"
    rows = []
    for title, wrap, backward, passes in (("forward", no_grad, False, 2), ("forward + backward", both, True, 5)):
        variants = {label: wrap(f) for label, f in forwards.items()}
        variants |= on_backends(rms_norm_op, device, partial(ours, backward))
        rows += run(f"{name}, {title}", variants, device=device, bytes=passes * x.nbytes)
    return rows


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int)
    made.add_argument("--columns", type=int)
    args = parsed(made, argv)
    m, k = (
        args.rows or (4096 if args.device == "cpu" else 16384),
        args.columns or (1024 if args.device == "cpu" else 4096),
    )
    jobs = [
        Job(f"{norm} norm {dtype_name(dtype)} {m} x {k}", partial(rows_for, args.device, dtype, m, k, norm == "layer"))
        for dtype in (torch.float32, torch.bfloat16)
        for norm in ("rms", "layer")
    ]
    measure(args, "rms_norm", jobs)


if __name__ == "__main__":
    main()
