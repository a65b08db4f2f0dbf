"""The steps of `bench/gpu.sh`: what needs a GPU, in stages that each fit one loan of a machine of ten minutes.

python -m bench.stage STAGE|BENCHMARK ... --results FOLDER [--seconds 540] [--dry]

A step is a module of bench, a process of its own: one that crashes, hangs or is cut off stops no other. It gets up to
twice its part of the time that is left, and none begins with less than 45 s left. Steps keep what they have measured at
the same commit on the same device, so that calling a stage again goes on where it ended. With --dry all run in this one
process, since most of a dry step is importing torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

STAGES = {
    # whether it is right, and how fast the machine is
    "1": ["ceilings", "gpu_tests", "launches --under memcheck", "launches --under racecheck"],
    # what decides the order of backends
    "2": ["lowrank_linear", "rows_grad", "perturb", "linear_cross_entropy"],
    # the other kernels
    "3": ["pack_act", "rms_norm", "glu", "rotary", "eager_attention", "launches --under ncu"],
    # whole blocks, steps and models
    "4": ["block", "block --lora", "mezo", "vcas", "llama", "host_time"],
}
LEAST = 45.0  # seconds: a step begun with less would give nothing
SHOWN = 60  # lines of a step's output that are printed


def steps_of(asked: list[str]) -> list[list[str]]:
    return [step.split() for name in asked for step in STAGES.get(name, [name])]


def share(left: float, remaining: int) -> float:
    """Seconds that the first of `remaining` steps may take: all for the last, else enough is left for the others."""
    return max(LEAST, min(2 * left / (remaining + 1), left - (LEAST + 3) * (remaining - 1)))


def in_process(command: list[str], seconds: float, log: Path) -> int | None:
    """The exit status of a command, or None if it was cut off. Everything that it started ends with it."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def dry(module: str, options: list[str], log: Path) -> int:
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            importlib.import_module(f"bench.{module}").main(options)
        except SystemExit as end:
            return int(end.code or 0)
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def run(step: list[str], args: argparse.Namespace, seconds: float, log: Path) -> int | None:
    module, *options = step
    options = [*options, "--results", str(args.results), "--resume"]
    if module == "gpu_tests":
        options += ["--limit", str(max(1.0, seconds - 25)), *args.tests.split()]
    if args.dry:
        return dry(module, [*options, "--dry"], log)
    return in_process([sys.executable, "-m", f"bench.{module}", "--device", "cuda", *options], seconds, log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("asked", nargs="+", metavar="STAGE|BENCHMARK")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--tests", default="tests", help="what gpu_tests runs")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    end = time.monotonic() + args.seconds
    logs = args.results / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    steps, lines, bad = steps_of(args.asked), [], 0

    def say(line: str) -> None:
        lines.append(line)
        (logs / f"steps-{'-'.join(args.asked)}.txt").write_text("\n".join(lines) + "\n")
        print(line, flush=True)  # last: who reads it may end this process

    for at, step in enumerate(steps):
        title, left = " ".join(step), end - time.monotonic()
        if left < LEAST:
            say(f"{title}: not begun, {left:.0f} s left")
            bad += 1
            continue
        say(f"{title}: begun, {left:.0f} s left")
        began, log = time.monotonic(), logs / f"{'-'.join(step).replace('---', '-')}.txt"
        status = run(step, args, min(left, share(left, len(steps) - at)), log)
        ended = "cut off" if status is None else f"exit {status}"
        say(f"{title}: {ended} after {time.monotonic() - began:.0f} s")
        print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:]), flush=True)
        bad += status != 0
    print("\n".join(line for line in lines if ": begun" not in line), flush=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
