"""Progress and memory while training."""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

import torch

from efftune.train import processes


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, int]:
    """Returns bytes now and at the peak. GPU: of the allocator, peak of this step; else of the process, peak of its
    life."""
    if device.type == "cuda":
        return {"memory": torch.cuda.memory_allocated(device), "memory_peak": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        with open("/proc/self/statm") as file:
            return {"memory": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), "memory_peak": peak}
    except OSError:
        return {"memory": peak, "memory_peak": peak}


def line(record: dict[str, Any]) -> str:
    numbers = [f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float)]
    return f"step {record['step']}: " + ", ".join(numbers)


class Progress:
    """A bar on a terminal; ten lines in a log file. `what` is the kind of steps, "train" or "pre-train"."""

    def __init__(self, total: int, start: int = 0, what: str = "train"):
        from tqdm import tqdm

        self.total, self.step, self.what = total, start, what
        silent = True if processes.rank() else None  # None: where there is no terminal
        self.bar = tqdm(total=total, initial=start, desc=what, unit="step", dynamic_ncols=True, disable=silent)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def update(self, record: dict[str, Any], counts: dict[str, int] | None = None) -> None:
        """`counts`: what methods have counted since the run began."""
        self.step += 1
        counted = "".join(f", {count:,} {name.replace('_', ' ')}" for name, count in (counts or {}).items())
        if self.bar.disable:
            if self.step % max(1, self.total // 10) == 0:
                rate = f", {record['tokens_per_s']:,.0f} tokens read/s" if record["tokens"] else ""
                kind = "" if self.what == "train" else f"{self.what} "
                print(f"{kind}step {self.step}/{self.total}: loss {record['loss']:.4f}{rate}{counted}", flush=True)
            return
        self.bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.1e}", refresh=False, **(counts or {}))
        self.bar.update()

    def write(self, text: str) -> None:
        self.bar.write(text)
