"""Timing that can be trusted: variants interleaved, medians with their spread, time of the host beside that of the
device, the peak of memory above where the call began, and the fraction of the measured ceiling (copy bandwidth, GEMM
rate).

    args = arguments(__doc__, argv)
    measure(args, "perturb", [Job("f32", lambda: run("f32", {"torch": f, "ours": g}, device=args.device, bytes=8 * n))])
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from efftune import use_backend
from efftune.ops._op import Op

ROOT = Path(__file__).parents[1]
SHORTEST = 2e-3  # seconds: shorter calls are timed several at a time
LONG = 20.0  # seconds: where one timing is asked for, such a call is not warmed up
DRY = "meta"  # the device of a dry run: shapes of a GPU's jobs, no memory, nothing launched


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), help="[cuda where there is one]")
    made.add_argument("--dry", action="store_true", help="a GPU's jobs without a GPU: all is built, nothing launched")
    made.add_argument("--results", type=Path, default=ROOT / "bench/results", help="folder of the JSON files")
    made.add_argument("--resume", action="store_true", help="keep the jobs measured at this commit on this device")
    return made


def parsed(made: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options read. `device` is where tensors are made: "cpu", "cuda", or "meta" for a dry run."""
    args = made.parse_args(argv)
    if args.dry:
        args.device = DRY
    elif args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def dtypes(device: str) -> list[torch.dtype]:
    """Those that the device multiplies in units of its own: times of bfloat16 without them say nothing."""
    units = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return [torch.float32, torch.bfloat16] if units else [torch.float32]


def kind(device: str) -> str:
    """ "cpu" or "cuda": whose jobs, shapes and backends these are. A dry run has those of a GPU."""
    return "cpu" if device == "cpu" else "cuda"


def timed(call: Callable[[], object], device: str, count: int = 1) -> tuple[float, float]:
    """Seconds per call: of the device, and of the host until the calls returned (on a CPU the same)."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        seconds = (time.perf_counter() - start) / count
        return seconds, seconds
    torch.cuda.synchronize()  # an empty queue: the host would wait for a full one
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    began = time.perf_counter()
    for _ in range(count):
        call()
    host = time.perf_counter() - began
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count, host / count


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
    most = (64 if device == "cpu" else 512) << 20
    source = torch.ones(min(most, memory(device) // 16), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timed(lambda: target.copy_(source), device)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device)[0] for _ in range(10))


@functools.cache
def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of a large square product, the best of ten."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    timed(lambda: a @ b, device)
    return 2 * n**3 / min(timed(lambda: a @ b, device)[0] for _ in range(10))


def memory(device: str) -> int:
    """Bytes that are free on the device."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    if device == DRY:
        return 1 << 62
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def too_large(device: str, need: int = 0) -> str:
    needs = f"needs {need / 2**30:.1f} GiB, more than" if need else "needs more memory than"
    return f"skipped: {needs} the {memory(device) / 2**30:.1f} GiB that are free on this device"


def why(error: Exception, device: str) -> str:
    """What a row says of a variant that did not run. The rest is measured all the same: on a borrowed machine there may
    be no second time. `measure` ends with an error if anything failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return too_large(device)
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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
    """One row for each variant. One that does not fit into a GPU's memory, or fails, and all of a dry run, have the row
    {name, variant, device, skipped: why}.

    Args:
        bytes, flops: what the job must move and compute at least; with dtype they give the ceiling, the longer of bytes
            at copy bandwidth and flops at GEMM rate.
        baseline: the variant that speedups refer to; the first if None.
        setup: runs before every timed call, not timed (to restore what the call overwrites, or to flush a cache).
    """
    counts: dict[str, int] = {}
    skipped = dict.fromkeys(variants, "skipped: a dry run") if device == DRY else {}
    samples: dict[str, list[tuple[float, float]]] = {label: [] for label in variants}
    for label, call in variants.items():
        try:
            for _ in range(0 if device == DRY else 2):  # the first call compiles
                if setup:
                    setup()
                seconds = timed(call, device)
                if repeats == 1 and seconds[0] > LONG:
                    samples[label].append(seconds)
                    break
                counts[label] = 1 if setup else max(1, int(SHORTEST / seconds[0]))
        except Exception as error:
            skipped[label] = why(error, device)
    labels = [label for label in variants if label not in skipped]
    for repeat in range(repeats if labels else 0):
        turn = repeat % len(labels)
        for label in labels[turn:] + labels[:turn]:  # nobody always comes first
            if len(samples[label]) > repeat:
                continue
            if setup:
                setup()
            samples[label].append(timed(variants[label], device, counts[label]))
    medians = {label: statistics.median(s for s, _ in samples[label]) for label in labels}
    moving = bytes / copy_bandwidth(device) if bytes and labels else 0.0
    floor = max(moving, flops / gemm_rate(dtype, device) if flops and labels else 0.0)
    against = medians.get(baseline or next(iter(variants)))
    rows = []
    for label, call in variants.items():
        row = {"name": name, "variant": label, "device": device}
        rows.append(row)
        if label in skipped:
            row["skipped"] = skipped[label]
            continue
        seconds = [s for s, _ in samples[label]]
        low, _, high = statistics.quantiles(seconds, n=4) if repeats > 1 else seconds * 3
        row |= {
            "median_s": medians[label],
            "host_s": statistics.median(host for _, host in samples[label]),
            "spread": (high - low) / medians[label],
            "speedup": against / medians[label] if against else None,
            "fraction_of_ceiling": floor / medians[label] if floor else None,
            "peak_bytes": peak_bytes(call, device),
            "samples_s": seconds,
        }
    return rows


@dataclass(frozen=True)
class Job:
    """Rows that are measured together, and the least bytes of memory that this takes."""

    name: str
    rows: Callable[[], list[dict]]
    memory: int = 0


def measure(
    args: argparse.Namespace, name: str, jobs: Iterable[Job], show: Callable[[list[dict]], None] | None = None
) -> list[dict]:
    """Runs the jobs and shows their rows (`print_table` if None). They are in `<name>-<device>.json` of the folder of
    results after each job, so that what was measured before an end that came early is kept; with --resume, jobs that
    are there from the same commit and device are not run again. A job too large for the device is a row that says so.
    """
    jobs, where = list(jobs), environment(args.device)
    path = args.results / f"{name}-{kind(args.device)}.json"
    found: dict[str, list[dict]] = finished(path, where) if args.resume else {}
    gc.freeze()  # what imports made stays: the collections below need not look through it
    for job in jobs:
        if job.name in found:
            continue
        row = {"name": job.name, "variant": "all", "device": args.device}
        try:
            fits = job.memory <= memory(args.device)
            found[job.name] = job.rows() if fits else [row | {"skipped": too_large(args.device, job.memory)}]
        except Exception as error:
            found[job.name] = [row | {"skipped": why(error, args.device)}]
        gc.collect()  # what a failed or finished job held is free before the next one asks for memory
        rows = [row | {"job": job.name} for job in jobs for row in found.get(job.name, [])]
        path.parent.mkdir(parents=True, exist_ok=True)
        saved = {"environment": where, "complete": len(found) == len(jobs), "rows": rows}
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(saved, indent=1) + "\n")
        beside.replace(path)
    rows = [row for job in jobs for row in found[job.name]]
    (show or print_table)(rows)
    if any(failed(row) for row in rows):
        raise SystemExit(1)
    return rows


def failed(row: dict) -> bool:
    return row.get("skipped", "").startswith("failed")


def finished(path: Path, where: dict) -> dict[str, list[dict]]:
    """Job -> rows of a file that was written at the same commit, without changes, on the same device."""
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    same = ("commit", "uncommitted_changes", "device")
    if where["commit"] is None or where["uncommitted_changes"]:
        return {}
    if any(saved["environment"].get(key) != where[key] for key in same):
        return {}
    found: dict[str, list[dict]] = {}
    for row in saved["rows"]:
        found.setdefault(row["job"], []).append(row)
    return {job: rows for job, rows in found.items() if not any(failed(row) for row in rows)}


def on_backend(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    def forced():
        with use_backend(backend):
            return call()

    return forced


def on_backends(
    op: Op, device: str, call: Callable[[], object], label: str = "efftune {}"
) -> dict[str, Callable[[], object]]:
    """A variant for each backend that `op` has for the device."""
    return {label.format(b.name): on_backend(b.name, call) for b in op.backends if kind(device) in b.devices}


def commit() -> tuple[str | None, bool]:
    """The commit, and whether the files differ from it. A tree without .git has both in a file COMMIT: the commit, and
    behind it a + if there were changes (`bench/gpu.sh pack` writes it)."""
    if not (ROOT / ".git").exists():
        carried = ROOT / "kit" / "COMMIT"
        text = carried.read_text().strip() if carried.exists() else ""
        return text.rstrip("+") or None, text.endswith("+")

    def git(*given: str) -> str:
        command = ["git", "-C", str(ROOT), *given]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # The results themselves are what a measurement changes.
    return git("rev-parse", "HEAD") or None, bool(git("status", "--porcelain", "--", ":!bench/results"))


def environment(device: str) -> dict:
    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = None
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    at, changed = commit()
    names = {"cuda": lambda: torch.cuda.get_device_name(), DRY: lambda: "none (a dry run)"}
    return {
        "commit": at,
        "uncommitted_changes": changed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": names.get(device, lambda: cpu.partition(":")[2].strip())(),
        "threads": torch.get_num_threads(),
        "copy_bytes_per_s": None if device == DRY else copy_bandwidth(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
    }


def print_table(rows: list[dict]) -> None:
    width = max(len(f"{r['name']}  {r['variant']}") for r in rows)
    titles = f"{'median':>10}  {'host':>10}  {'spread':>6}  {'speedup':>7}  {'of ceiling':>10}  {'peak MiB':>9}"
    print(f"{'':{width}}  {titles}")
    for r in rows:
        title = f"{r['name'] + '  ' + r['variant']:{width}}"
        if "skipped" in r:
            print(f"{title}  {r['skipped']}")
            continue
        fraction = "" if r["fraction_of_ceiling"] is None else f"{r['fraction_of_ceiling']:.0%}"
        speedup = "" if r["speedup"] is None else f"{r['speedup']:.2f}x"
        print(
            f"{title}  {r['median_s'] * 1e3:7.3f} ms  {r['host_s'] * 1e3:7.3f} ms  {r['spread']:6.0%}  "
            f"{speedup:>7}  {fraction:>10}  {r['peak_bytes'] / 2**20:9.1f}"
        )
