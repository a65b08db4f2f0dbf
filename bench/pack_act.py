"""Packing and unpacking activations, against a clone of x and the same arithmetic in torch.

python -m bench.pack_act [--device cpu|cuda] [--elements N]
"""

from __future__ import annotations

from functools import partial

import torch

from bench.harness import Job, measure, on_backends, parsed, parser, run
from efftune.ops._available import dtype_name
from efftune.ops.draw_seed import draw_seed
from efftune.ops.pack_act import pack_act, pack_op, unpack_act

GROUP, COLS = 64, 2048


def torch_pack(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What one writes in torch: unbiased, the draws from torch's generator, the statistics rounded outwards."""
    grouped = x.float().unflatten(-1, (-1, GROUP))
    low = grouped.amin(-1, keepdim=True)
    low = (low - low.abs() * 2**-8).to(torch.bfloat16)
    scale = ((grouped.amax(-1, keepdim=True) - low) * ((1 + 2**-7) / (2**bits - 1))).to(torch.bfloat16)
    position = (grouped - low) / scale.float()
    codes = (position + torch.rand_like(position)).floor_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, torch.cat([low, scale], -1)


def torch_unpack(codes: torch.Tensor, stats: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    low, scale = stats.float().split(1, -1)
    return torch.addcmul(low, codes.unflatten(-1, (-1, GROUP)).float(), scale).flatten(-2).to(dtype)


def rows_for(device: str, dtype: torch.dtype, bits: int, n: int) -> list[dict]:
    x = torch.randn(n // COLS, COLS, device=device).to(dtype)
    seed, codes, stats = draw_seed(), *pack_act(x, bits, GROUP, draw_seed())
    compiled_pack, compiled_unpack = torch.compile(torch_pack), torch.compile(torch_unpack)
    pack = {"torch": lambda: torch_pack(x, bits), "torch.compile": lambda: compiled_pack(x, bits)}
    unpack = {
        "torch": lambda: torch_unpack(codes, stats, bits, dtype),
        "torch.compile": lambda: compiled_unpack(codes, stats, bits, dtype),
    }

    pack |= on_backends(pack_op, device, lambda: pack_act(x, bits, GROUP, seed))
    pack |= on_backends(pack_op, device, lambda: pack_act(x, bits, GROUP, None), "efftune {}, nearest")
    unpack |= on_backends(pack_op, device, lambda: unpack_act(codes, stats, bits, GROUP, COLS, dtype))
    pack["clone"] = unpack["clone"] = lambda: x.clone()
    job = f"{dtype_name(dtype)} {n >> 20}M {device}"
    moved, repeats = x.nbytes + codes.nbytes + stats.nbytes, 7 if device == "cpu" else 30
    return run(f"pack{bits} {job}", pack, device=device, bytes=moved, repeats=repeats) + run(
        f"unpack{bits} {job}", unpack, device=device, bytes=moved, repeats=repeats
    )


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--elements", type=int)
    args = parsed(made, argv)
    n = args.elements or ((8 if args.device == "cpu" else 128) << 20)
    dtypes = (torch.bfloat16,) if args.device == "cpu" else (torch.bfloat16, torch.float32)
    jobs = [
        Job(f"{dtype_name(dtype)} {bits} {n}", partial(rows_for, args.device, dtype, bits, n))
        for dtype in dtypes
        for bits in (8, 4)
    ]
    measure(args, "pack_act", jobs)


if __name__ == "__main__":
    main()
