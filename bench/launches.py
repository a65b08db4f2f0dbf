"""Every kernel once: alone, under compute-sanitizer on small shapes, or under ncu on large ones.

python -m bench.launches [--device cpu|cuda] [--dry] [--under memcheck|racecheck|ncu] [--large] [--only OPERATOR ...]

Alone, each backend that an operator has for the device is called twice, the second time between the marks that ncu
looks for. With --under the command runs itself under that tool and writes what the tool found to
launches-<tool>-<device>.json: errors, or of each kernel its time and its shares of the memory's and of the
multiprocessors' speed (the section SpeedOfLight). Where the tool is missing the row says so.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch

from bench.harness import Job, kind, measure, parsed, parser
from efftune import perturb_, use_backend
from efftune.ops import _op
from efftune.ops.dropout import dropout
from efftune.ops.entries_grad import entries_grad
from efftune.ops.entries_linear import entries_linear, entries_linear_t
from efftune.ops.glu import glu, glu_backward
from efftune.ops.int8 import int8_dequantize, int8_quantize
from efftune.ops.linear_cross_entropy import linear_cross_entropy
from efftune.ops.lowrank_linear import lowrank_linear
from efftune.ops.pack_act import pack_act, unpack_act
from efftune.ops.perturb import perturb_many_
from efftune.ops.relu import relu, relu_backward
from efftune.ops.rms_norm import rms_norm, rms_norm_apply, rms_norm_backward
from efftune.ops.rotary import rotary_pair
from efftune.ops.rows_grad import rows_grad
from efftune.ops.sample_rows import row_norms, sample_rows, select_rows

SMALL, LARGE = (37, 136, 72, 300), (4096, 4096, 4096, 16384)  # tokens, inputs, outputs, vocabulary
TOOLS = {
    "memcheck": ["compute-sanitizer", "--tool", "memcheck"],
    "racecheck": ["compute-sanitizer", "--tool", "racecheck"],
    "ncu": ["ncu", "--section", "SpeedOfLight", "--clock-control", "none", "--profile-from-start", "off", "--csv"],
}
SHARES = {"Memory Throughput": "memory", "Compute (SM) Throughput": "compute", "Duration": "duration"}
SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3}


def calls(device: str, size: tuple[int, int, int, int] = SMALL) -> dict[str, Callable[[], object]]:
    """Operator -> a call of it, with both of its kernels where one serves forward and one backward."""
    m, k, n, v = size
    dtype, seed = torch.bfloat16, torch.tensor(7)

    def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, dy, w, weight = made(m, k), made(m, k), made(n, k), made(k)
    scores, taken = torch.rand(m, device=device) + 0.1, max(1, m // 3)
    # made without the operators, whose kernels come one at a time
    idx = torch.arange(taken, device=device)
    wide = torch.ones(taken, device=device)
    entries = torch.arange(0, n * k, 101, dtype=torch.int32, device=device)
    values, outputs = torch.zeros(len(entries), device=device), made(m, n)
    mean, rstd = torch.zeros(m, device=device), torch.ones(m, device=device)
    groups = -(-k // 64)
    bits = torch.zeros((m * k + 7) // 8, dtype=torch.uint8, device=device)
    codes, stats = torch.zeros(m, k, dtype=torch.uint8, device=device), made(m, groups, 2)
    q, cos, sin = made(2, 4, m, 64), made(1, m, 64), made(1, m, 64)
    h, b = made(m, 16), made(n, 16)
    hidden, head = made(m, k).requires_grad_(), made(v, k).requires_grad_()
    targets = torch.randint(v, (m,), device=device)
    stored, scales = int8_quantize(w.float(), 64)

    one = torch.full((), 1e-3, device=device)
    both, acts = (False, True), ("silu", "gelu", "gelu_tanh")

    def loss(trains_head: bool) -> None:
        taken = head if trains_head else head.detach()
        linear_cross_entropy(hidden, taken, targets).backward()
        hidden.grad = head.grad = None

    def samplers() -> tuple[str, ...]:  # the CUDA kernel takes one of them
        return ("systematic",) if _op.forced_backend() == "cuda" else ("systematic", "wta", "crs")

    def perturbed() -> None:
        for dist in ("normal", "rademacher"):
            perturb_(x, 1e-3, seed=1, stream=1, dist=dist, rounding="stochastic")
            perturb_(x, torch.ones(3, device=device), seed=[1, 2, 3], stream=1, dist=dist)
        perturb_(x, 1e-3, seed=1, stream=1, threshold=1.0)

    def perturbed_together() -> None:
        parts, streams = [x, made(9), made(1, k)[:, 1:]], [1, 2, 3]  # aligned and not
        for dist in ("normal", "rademacher"):
            perturb_many_(parts, one, seed=1, streams=streams, dist=dist, rounding="stochastic")
            perturb_many_(parts, torch.ones(3, device=device), seed=[1, 2, 3], streams=streams, dist=dist)

    return {
        "perturb": perturbed,
        "perturb_many": perturbed_together,
        "dropout": lambda: dropout(x, 0.1, seed, 1),
        "pack_act": lambda: [pack_act(x, bits, 64, s) for bits in (8, 4) for s in (seed, None)],
        "unpack_act": lambda: [unpack_act(codes[:, : -(-k * bits // 8)].contiguous(), stats, bits, 64, k, dtype)
                               for bits in (8, 4)],
        "rms_norm": lambda: [rms_norm(x, weight, weight if c else None, 1e-6, 0.0, c) for c in both],
        "rms_norm_apply": lambda: rms_norm_apply(x, weight, None, mean, rstd),
        "rms_norm_backward": lambda: [rms_norm_backward(dy, x, weight, mean, rstd, 0.0, True, c) for c in both],
        "glu": lambda: [glu(x, dy, a) for a in acts],
        "glu_backward": lambda: [glu_backward(dy, x, dy, a) for a in acts],
        "relu": lambda: relu(x),
        "relu_backward": lambda: relu_backward(dy, bits),
        "rotary": lambda: [rotary_pair(q, q[:, :1], cos, sin, transposed) for transposed in both],
        "int8_dequantize": lambda: int8_dequantize(stored, scales, 64, dtype),
        "lowrank_linear": lambda: lowrank_linear(x, w, h, b, None),
        "row_norms": lambda: row_norms(x),
        "select_rows": lambda: [select_rows(scores, taken, seed, s) for s in samplers()],
        "sample_rows": lambda: sample_rows(x, scores, taken, seed),
        "rows_grad": lambda: rows_grad(dy, idx, wide, x[:taken]),
        "entries_grad": lambda: entries_grad(outputs, x, entries),
        "entries_linear": lambda: [entries_linear(outputs, x, entries, values),
                                   entries_linear_t(x, outputs, entries, values)],
        "linear_cross_entropy": lambda: loss(False),
        "linear_cross_entropy_dw": lambda: loss(True),
    }  # fmt: skip


def kernels(device: str) -> list[tuple[str, str]]:
    """(operator, backend) of all that is compiled for the device."""
    return [
        (op.name, b.name)
        for op in _op.OPS.values()
        for b in op.backends
        if kind(device) in b.devices and b.name != "torch"
    ]


def launch(args: argparse.Namespace) -> None:
    """Raises SystemExit at the end if one failed: the others are looked at all the same."""
    made, status = calls(args.device, LARGE if args.large else SMALL), 0
    for name, backend in kernels(args.device):
        if args.only and name not in args.only:
            continue
        call = made[name]
        print(f"{name} {backend}", flush=True)
        try:
            with use_backend(backend):
                if not args.dry:
                    twice(call, args.device)
        except Exception:
            traceback.print_exc()
            status = 1
    if status:
        raise SystemExit(status)


def twice(call: Callable[[], object], device: str) -> None:
    """Once to compile, then between the marks that ncu looks for."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def rows_of(tool: str, output: str) -> list[dict]:
    """What a tool's report says: for ncu a row for each kernel, else one with the number of errors."""
    if tool != "ncu":
        counted = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
        return [{"variant": "all kernels", "found": int(counted[-1])}] if counted else []
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict] = {}
    for line in csv.DictReader(lines[start:]):
        if line["Metric Name"] not in SHARES:
            continue
        row = launches.setdefault(line["ID"], {"variant": line["Kernel Name"]})
        value, unit = float(line["Metric Value"].replace(",", "")), line["Metric Unit"]
        row[SHARES[line["Metric Name"]]] = value / 100 if unit == "%" else value * SECONDS.get(unit, 1.0)
    return list(launches.values())


def under(tool: str, args: argparse.Namespace) -> list[dict]:
    row = {"name": f"{tool}, {kind(args.device)}", "variant": "all kernels", "device": args.device}
    command = [sys.executable, "-m", "bench.launches", "--device", "cuda"]
    command += ["--large"] if args.large or tool == "ncu" else []
    command += ["--only", *args.only] if args.only else []
    if args.dry:
        launch(args)
        return [row | {"skipped": "skipped: a dry run"}]
    if shutil.which(TOOLS[tool][0]) is None:
        return [row | {"skipped": f"skipped: {TOOLS[tool][0]} is not on the PATH"}]
    # one allocation a tensor: in the cache's large blocks a write past the end of a tensor is no error
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([*TOOLS[tool], *command], capture_output=True, text=True, env=environment, check=False)
    output = done.stdout + done.stderr
    log = args.results / "logs" / f"launches-{tool}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(output)
    found = rows_of(tool, output)
    if done.returncode or not found:  # no permission to read counters, a device that the tool does not know, ...
        last = [line for line in output.splitlines() if re.search(r"error", line, re.IGNORECASE)][-1:]
        found.append({"variant": "the tool itself", "skipped": f"failed: exit {done.returncode} {''.join(last)}"})
    return [row | each for each in found]


def show(rows: list[dict]) -> None:
    for row in rows:
        if "skipped" in row:
            print(f"{row['name']:20} {row['variant']}: {row['skipped']}")
        elif "found" in row:
            print(f"{row['name']:20} {row['found']} errors")
        else:
            shares = "  ".join(f"{key} {row[key]:5.0%}" for key in ("memory", "compute") if key in row)
            print(f"{row['variant'][:60]:60} {row.get('duration', 0.0) * 1e6:9.1f} us  {shares}")


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--under", choices=sorted(TOOLS))
    options.add_argument("--large", action="store_true", help="shapes of a 7B model's layer [of ncu]")
    options.add_argument("--only", nargs="+", metavar="OPERATOR")
    args = parsed(options, argv)
    if args.under is None:
        return launch(args)
    measure(args, f"launches-{args.under}", [Job(args.under, partial(under, args.under, args))], show)


if __name__ == "__main__":
    main()
