"""How many threads a CPU trains with. Threads wait for each other at every operation: on a small model, or beside other
programs, all of them can take ten times as long as one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

ROUNDS = 3  # timings of each number of threads; the least counts
ENOUGH = 2.0  # seconds after which no further round begins


def use_faster(call: Callable[[], object]) -> dict[int, float]:
    """Times `call` with one thread and with as many as torch has now, in turns; torch is left with the faster number.

    Returns: seconds by number of threads. Empty where torch has one thread; `call` is not called then.
    Raises: what `call` raises; torch then has as many threads as before.
    """
    every = torch.get_num_threads()
    if every == 1:
        return {}
    call()  # makes what is made once
    best, faster = {1: math.inf, every: math.inf}, every
    started = time.perf_counter()
    try:
        for _ in range(ROUNDS):
            for count, least in best.items():
                torch.set_num_threads(count)
                begun = time.perf_counter()
                call()
                best[count] = min(least, time.perf_counter() - begun)
            if time.perf_counter() - started > ENOUGH:
                break
        faster = min(best, key=best.__getitem__)
    finally:
        torch.set_num_threads(faster)
    return best
