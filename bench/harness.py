"""Timing that can be trusted: variants interleaved, medians with their spread, the peak of memory above where the call
began, and the fraction of the measured ceiling (copy bandwidth, GEMM rate).

    rows = run("perturb f32", {"torch": f, "ours": g}, device="cpu", bytes=8 * n, baseline="torch")
    save(rows, "bench/results/perturb-cpu.json")
    print_table(rows)
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from efftune import use_backend
from efftune.ops._op import Op

SHORTEST = 2e-3  # seconds: shorter calls are timed several at a time
LONG = 20.0  # seconds: where one timing is asked for, such a call is not warmed up


def timed(call: Callable[[], object], device: str, count: int = 1) -> float:
    """Seconds per call."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes of torch's allocator in use during the call, above those in use before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a large copy, the best of ten."""
    source = torch.ones((64 if device == "cpu" else 512) << 20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timed(lambda: target.copy_(source), device)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(10))


@functools.cache
def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of a large square product, the best of ten."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    timed(lambda: a @ b, device)
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def run(
    name: str,
    variants: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    bytes: int = 0,
    flops: int = 0,
    dtype: torch.dtype = torch.float32,
    baseline: str | None = None,
    repeats: int = 15,
    setup: Callable[[], object] | None = None,
) -> list[dict]:
    """One row for each variant.

    Args:
        bytes, flops: what the job must move and compute at least; with dtype they give the ceiling, the longer of bytes
            at copy bandwidth and flops at GEMM rate.
        baseline: the variant that speedups refer to; the first if None.
        setup: runs before every timed call, not timed (to restore what the call overwrites, or to flush a cache).
    """
    counts = {}
    samples: dict[str, list[float]] = {label: [] for label in variants}
    for label, call in variants.items():
        for _ in range(2):  # the first call compiles
            if setup:
                setup()
            seconds = timed(call, device)
            if repeats == 1 and seconds > LONG:
                samples[label].append(seconds)
                break
        counts[label] = 1 if setup else max(1, int(SHORTEST / seconds))
    labels = list(variants)
    for repeat in range(repeats):
        for label in labels[repeat % len(labels) :] + labels[: repeat % len(labels)]:  # nobody always comes first
            if len(samples[label]) > repeat:
                continue
            if setup:
                setup()
            samples[label].append(timed(variants[label], device, counts[label]))
    medians = {label: statistics.median(s) for label, s in samples.items()}
    floor = max(bytes / copy_bandwidth(device) if bytes else 0.0, flops / gemm_rate(dtype, device) if flops else 0.0)
    rows = []
    for label, call in variants.items():
        low, _, high = statistics.quantiles(samples[label], n=4) if repeats > 1 else samples[label] * 3
        rows.append(
            {
                "name": name,
                "variant": label,
                "device": device,
                "median_s": medians[label],
                "spread": (high - low) / medians[label],
                "speedup": medians[baseline or labels[0]] / medians[label],
                "fraction_of_ceiling": floor / medians[label] if floor else None,
                "peak_bytes": peak_bytes(call, device),
                "samples_s": samples[label],
            }
        )
    return rows


def on_backend(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    def forced():
        with use_backend(backend):
            return call()

    return forced


def on_backends(
    op: Op, device: str, call: Callable[[], object], label: str = "efftune {}"
) -> dict[str, Callable[[], object]]:
    """A variant for each backend that `op` has for the device."""
    return {label.format(b.name): on_backend(b.name, call) for b in op.backends if device in b.devices}


def environment(device: str) -> dict:
    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = None
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    return {
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device != "cpu" else model.partition(":")[2].strip(),
        "threads": torch.get_num_threads(),
        "copy_bytes_per_s": copy_bandwidth(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
    }


def save(rows: list[dict], path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(rows[0]["device"]), "rows": rows}, indent=1) + "\n")


def print_table(rows: list[dict]) -> None:
    width = max(len(f"{r['name']}  {r['variant']}") for r in rows)
    print(f"{'':{width}}  {'median':>10}  {'spread':>6}  {'speedup':>7}  {'of ceiling':>10}  {'peak MiB':>9}")
    for r in rows:
        fraction = "" if r["fraction_of_ceiling"] is None else f"{r['fraction_of_ceiling']:.0%}"
        print(
            f"{r['name'] + '  ' + r['variant']:{width}}  {r['median_s'] * 1e3:7.3f} ms  {r['spread']:6.0%}  "
            f"{r['speedup']:6.2f}x  {fraction:>10}  {r['peak_bytes'] / 2**20:9.1f}"
        )
