"""The state of random generators, saved, compared and restored: torch's of one device, or all that a run has."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def set_seed(seed: int) -> None:
    """Seeds the generators of Python, numpy and torch, of every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_states() -> dict[str, Any]:
    """States of the generators of Python, numpy and torch, of every device; a checkpoint has them so."""
    name, keys, position, has_gauss, cached = cast(tuple, np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else [],
    }


def unchanged(states: dict[str, Any]) -> bool:
    """Whether no generator has drawn since `generator_states` gave `states`."""
    now = generator_states()
    tensors = [(of["torch"], *of["cuda"]) for of in (now, states)]
    same = len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))
    return same and (now["python"], now["numpy"]) == (states["python"], states["numpy"])


def restore_generators(states: dict[str, Any]) -> None:
    """Puts all generators back to what `generator_states` gave, those of GPUs if there are as many."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def generators(device: torch.device) -> tuple[Tensor, ...]:
    """States of torch's generators of the CPU and of `device`."""
    device_state = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return torch.get_rng_state(), *device_state


def set_generators(states: tuple[Tensor, ...], device: torch.device) -> None:
    """Puts back what `generators` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def has_drawn(states: tuple[Tensor, ...], device: torch.device) -> bool:
    """Whether something has been drawn on the CPU or on `device` since they were `states`."""
    return not all(torch.equal(a, b) for a, b in zip(states, generators(device), strict=True))


@contextmanager
def replaying(states: tuple[Tensor, ...] | None, device: torch.device) -> Iterator[None]:
    """Generators as they were at `states`, and afterwards as before. None: nothing."""
    if states is None:
        yield
        return
    before = generators(device)
    set_generators(states, device)
    try:
        yield
    finally:
        set_generators(before, device)
