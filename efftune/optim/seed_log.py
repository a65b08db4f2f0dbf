"""A zeroth-order run as what it was made of: (seed, scalar, step), sixteen bytes a step."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError

FORMAT = "efftune-seed-log-1"
ENTRY = np.dtype([("direction", "<u8"), ("scalar", "<f4"), ("step", "<u4")])
SEED_BITS = 48  # of a direction; the part is in the 16 above
DECAY = 2**SEED_BITS - 1  # as a seed: the weights of the part are multiplied by the scalar
TOGETHER = 1024  # scalars that are fetched from the device at a time
CHUNK = 2**22


@dataclass
class SeedLog:
    """w ← w + scalar · z(seed) for each entry in turn, on the parameters of its part.

    A part is what one entry acts on: a group of the optimizer, less the parameters that no forward used. Most runs have
    one. Scalars may still be on the device; they are fetched together when somebody reads the log.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)  # {"group": index, "unused": [names]}
    entries: np.ndarray = field(default_factory=lambda: np.empty(0, ENTRY))
    waiting: list[tuple[int, Tensor, int]] = field(default_factory=list)

    def append(self, step: int, seed: int, scalar: Tensor, group: int, unused: list[str]) -> None:
        """scalar: (), what z is multiplied by."""
        part = {"group": group, "unused": unused}
        if part not in self.parts:
            self.parts.append(part)
        self.waiting.append((self.parts.index(part) << SEED_BITS | seed, scalar, step))
        if len(self.waiting) >= TOGETHER:
            self.fetch()

    def fetch(self) -> np.ndarray:
        """All entries, the waiting ones included. Waits for the device."""
        if self.waiting:
            directions, scalars, steps = zip(*self.waiting, strict=True)
            new = np.empty(len(directions), ENTRY)
            new["direction"], new["step"] = directions, steps
            new["scalar"] = torch.stack([scalar.float() for scalar in scalars]).cpu().numpy()
            self.entries, self.waiting = np.concatenate([self.entries, new]), []
        return self.entries

    def by_step(self) -> Iterator[tuple[int, list[tuple[dict[str, Any], int, float]]]]:
        """(step, its (part, seed, scalar) in order)."""
        for step, rows in groupby(self.fetch().tolist(), key=lambda row: row[2]):
            yield step, [(self.parts[d >> SEED_BITS], d & DECAY, scalar) for d, scalar, _ in rows]

    def sums(self) -> list[tuple[dict[str, Any], list[int], np.ndarray]]:
        """(part, seeds, the sum of each one's scalars (float32)): what a run comes to where order does not matter, with
        neither momentum nor weight decay. Raises: EfftuneError for a log with weight decay."""
        entries = self.fetch()
        if (entries["direction"] & np.uint64(DECAY) == DECAY).any():
            raise EfftuneError("The log has weight decay, so that its steps do not commute; replay it step by step.")
        found = []
        for index, part in enumerate(self.parts):
            mine = entries[entries["direction"] >> np.uint64(SEED_BITS) == index]
            seeds, where = np.unique(mine["direction"] & np.uint64(DECAY), return_inverse=True)
            totals = np.bincount(where, weights=mine["scalar"].astype(np.float64), minlength=len(seeds))
            found.append((part, seeds.tolist(), totals.astype(np.float32)))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [dict(part) for part in self.parts], "entries": as_bytes(self.fetch())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts, self.waiting = [dict(part) for part in state["parts"]], []
        self.entries = np.frombuffer(state["entries"].cpu().numpy().tobytes(), ENTRY)

    def save(self, path: str | Path, about: dict[str, Any]) -> None:
        """A safetensors file with the one tensor `entries` (n, 16) uint8; `about` and the parts go into its header."""
        from safetensors.torch import save_file

        entries = self.fetch()
        header = {"format": FORMAT, "about": json.dumps({**about, "parts": self.parts, "count": len(entries)})}
        save_file({"entries": as_bytes(entries)}, path, metadata=header)

    @staticmethod
    def load(path: str | Path) -> tuple[SeedLog, dict[str, Any]]:
        """-> the log, and what `save` was given, with "count": how many entries there were when it was written. A file
        that was cut short gives the entries before the cut.

        Raises: EfftuneError for what is no seed log, or is cut before its first entry.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise EfftuneError(f"{path} cannot be read ({error.strerror}).") from None
        try:
            (length,) = struct.unpack_from("<Q", data)
            header = json.loads(data[8 : 8 + length])
            metadata, tensor = header["__metadata__"], header["entries"]
            if metadata["format"] != FORMAT or tensor["dtype"] != "U8" or tensor["data_offsets"][0] != 0:
                raise ValueError
            about = json.loads(metadata["about"])
            body = data[8 + length : 8 + length + tensor["data_offsets"][1]]
            parts, count = about.pop("parts"), about["count"]
            entries = np.frombuffer(body[: len(body) - len(body) % ENTRY.itemsize], ENTRY)
            known = all(isinstance(p["group"], int) and isinstance(p["unused"], list) for p in parts)
            if not known or (entries["direction"] >> np.uint64(SEED_BITS) >= len(parts)).any():
                raise ValueError
        except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise EfftuneError(f"{path} is no seed log, or its beginning is damaged; fetch it again.") from None
        if count and not len(entries):
            raise EfftuneError(f"{path} is cut before its first entry; fetch it again.")
        return SeedLog(parts, entries), about


def as_bytes(entries: np.ndarray) -> Tensor:
    """(n, 16) uint8."""
    return torch.from_numpy(entries.view(np.uint8).reshape(-1, ENTRY.itemsize).copy())


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and checksums of all parameters and buffers: equal on all devices."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {checksum(tensor)}\n".encode())
    return digest.hexdigest()


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """Σ word_i · (2i + 1) · odd mod 2^64 over the tensor's 16-bit words (bytes, if it has an odd number of them)."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = raw if raw.numel() % 2 else raw.view(torch.int16)
    total = 0
    for start in range(0, words.numel(), CHUNK):
        part = words[start : start + CHUNK].long()
        place = torch.arange(start, start + len(part), device=part.device) * 2 + 1
        total += int((part * (place * 0x1E3779B97F4A7C15)).sum())  # integers wrap
    return total % 2**64
