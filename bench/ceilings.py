"""What the machine can do: bytes a second of a large copy, and operations a second of a large matrix product.

python -m bench.ceilings [--device cpu|cuda] [--dry]
"""

from __future__ import annotations

from functools import partial

import torch

from bench.harness import DRY, Job, copy_bandwidth, gemm_rate, measure, memory, parsed, parser
from efftune.ops._available import dtype_name


def copy(device: str) -> tuple[float, str]:
    return copy_bandwidth(device) / 1e9, "GB/s, read and written"


def product(dtype: torch.dtype, device: str) -> tuple[float, str]:
    return gemm_rate(dtype, device) / 1e12, "TFLOP/s"


def free(device: str) -> tuple[float, str]:
    return memory(device) / 2**30, "GiB"


def rows_for(name: str, what, device: str) -> list[dict]:
    row = {"name": name, "variant": "ceiling", "device": device}
    if device == DRY:
        return [row | {"skipped": "skipped: a dry run"}]
    value, unit = what(device)
    return [row | {"ceiling": value, "unit": unit}]


def show(rows: list[dict]) -> None:
    for row in rows:
        print(f"{row['name']:32}", row.get("skipped") or f"{row['ceiling']:10.2f} {row['unit']}")


def main(argv: list[str] | None = None) -> None:
    args = parsed(parser(__doc__), argv)
    asked = {"memory, free": free, "copy": copy}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        asked[f"matrix product, {dtype_name(dtype)}"] = partial(product, dtype)
    jobs = [Job(name, partial(rows_for, name, what, args.device)) for name, what in asked.items()]
    measure(args, "ceilings", jobs, show)


if __name__ == "__main__":
    main()
