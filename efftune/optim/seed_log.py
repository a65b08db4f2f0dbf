"""A run as what it was made of: (seed, scalar, step), 16 bytes a step, or the numbers of rounds, 4 bytes each."""

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
from efftune.linear.module import take_back

FORMAT = "efftune-seed-log-2"
ENTRY = np.dtype([("direction", "<u8"), ("scalar", "<f4"), ("step", "<u4")])
NUMBER = np.dtype("<f4")
SEED_BITS = 48  # of a direction; the part is in the 16 above
PARTS = 2**16
DECAY = 2**SEED_BITS - 1  # as a seed: the weights of the part are multiplied by the scalar
TOGETHER = 1024  # scalars that are fetched from the device at a time
CHUNK = 2**22
Direction = tuple[int, Tensor, frozenset[int]]  # seed, scalar (), ids of the parameters that it is for


@dataclass
class SeedLog:
    """w ← w + scalar · z(seed) for each entry in turn, on the parameters of its part.

    A part is what one entry acts on: a group of the optimizer, less the parameters that no forward used. Most runs have
    one. Scalars may still be on the device; they are fetched together when somebody reads the log.

    Of a run that projects (ferret), a part is one parameter and an entry is a round of it. Its seeds follow from the
    recipe; in the seed's place stands how many numbers it has, four bytes each, behind the entries.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)  # {"group": index, "unused": [names]} or {"only": name}
    entries: np.ndarray = field(default_factory=lambda: np.empty(0, ENTRY))
    waiting: list[tuple[int, Tensor, int]] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)  # float32, of each entry of a round
    places: dict[str, int] = field(default_factory=dict)  # of the parts, by what they are
    ended: bool = False  # there were more parts than an entry can name: what came behind is lost

    def append(self, step: int, seed: int, scalar: Tensor, group: int, unused: list[str]) -> None:
        """scalar: (), what z is multiplied by."""
        part = self._part({"group": group, "unused": unused})
        self.ended |= part == PARTS
        if self.ended:
            return
        self.waiting.append((part << SEED_BITS | seed, scalar, step))
        if len(self.waiting) >= TOGETHER:
            self.fetch()

    def append_step(
        self,
        step: int,
        group: int,
        named: list[tuple[str, nn.Parameter]],
        directions: list[Direction],
        decay: float,
        used: frozenset[int],
    ) -> None:
        """Appends what a step does to the parameters `named` of a group: those in `used` times `decay`, then
        directions."""
        for seed, scalar, ids in (
            directions if decay == 1 else [(DECAY, directions[0][1].new_tensor(decay), used), *directions]
        ):
            self.append(step, seed, scalar, group, [name for name, p in named if id(p) not in ids])

    def append_round(self, step: int, numbers: dict[str, Tensor]) -> None:
        """numbers: parameter -> (n,), of its change (`efftune.optim.projection`). Waits for the device."""
        new = np.zeros(len(numbers), ENTRY)
        for i, (name, a) in enumerate(numbers.items()):
            new[i] = self._part({"only": name}) << SEED_BITS | len(a), 0.0, step
            self.numbers.append(a.cpu().numpy().astype(NUMBER))
        self.entries = np.concatenate([self.entries, new])

    def _part(self, part: dict[str, Any]) -> int:
        if len(self.places) != len(self.parts):
            self.places = {json.dumps(known): i for i, known in enumerate(self.parts)}
        index = self.places.get(json.dumps(part), len(self.parts))
        if index == len(self.parts) < PARTS:
            self.places[json.dumps(part)] = index
            self.parts.append(part)
        return index

    @property
    def count(self) -> int:
        """The number of scalars in the log."""
        return sum(map(len, self.numbers)) if self.numbers else len(self.entries) + len(self.waiting)

    def rounds(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, parameter -> its numbers), as `append_round` was given them."""
        rows = zip(self.entries.tolist(), self.numbers, strict=True)
        for step, entries in groupby(rows, key=lambda row: row[0][2]):
            yield step, {self.parts[entry[0] >> SEED_BITS]["only"]: a for entry, a in entries}

    def fetch(self) -> np.ndarray:
        """Returns all entries, after those that are still on the device have been fetched. Waits for the device."""
        if self.waiting:
            directions, scalars, steps = zip(*self.waiting, strict=True)
            new = np.empty(len(directions), ENTRY)
            new["direction"], new["step"] = directions, steps
            new["scalar"] = torch.stack([scalar.float() for scalar in scalars]).cpu().numpy()
            self.entries, self.waiting = np.concatenate([self.entries, new]), []
        return self.entries

    def by_step(self) -> Iterator[tuple[int, list[tuple[dict[str, Any], int, float]]]]:
        """Yields each step with its (part, seed, scalar) in order."""
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
            of_part = entries[entries["direction"] >> np.uint64(SEED_BITS) == index]
            seeds, where = np.unique(of_part["direction"] & np.uint64(DECAY), return_inverse=True)
            totals = np.bincount(where, weights=of_part["scalar"].astype(np.float64), minlength=len(seeds))
            found.append((part, seeds.tolist(), totals.astype(np.float32)))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [dict(part) for part in self.parts], **self._tensors()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts, self.waiting = [dict(part) for part in state["parts"]], []
        self.entries = np.frombuffer(state["entries"].cpu().numpy().tobytes(), ENTRY)
        if "numbers" in state:
            self._take(state["numbers"].cpu().numpy().tobytes())

    def _tensors(self) -> dict[str, Tensor]:
        """(n, 16) uint8, and the numbers of rounds, (m, 4) uint8, where there are any."""
        tensors = {"entries": as_bytes(self.fetch())}
        return {**tensors, "numbers": as_bytes(np.concatenate(self.numbers))} if self.numbers else tensors

    def _digest(self, about: str) -> str:
        digest = hashlib.sha256(about.encode() + self.fetch().tobytes())
        for numbers in self.numbers:
            digest.update(numbers.tobytes())
        return digest.hexdigest()

    def _take(self, numbers: bytes) -> None:
        """Gives each entry its numbers. A round whose numbers are not all there goes, with those behind it."""
        values = np.frombuffer(numbers[: len(numbers) - len(numbers) % NUMBER.itemsize], NUMBER)
        ends = np.cumsum(self.entries["direction"] & np.uint64(DECAY)).astype(np.int64)
        lacking = self.entries["step"][ends > len(values)]
        if len(lacking):
            there = self.entries["step"] < lacking[0]
            self.entries, ends = self.entries[there], ends[there]
        self.numbers = np.split(values, ends)[:-1]

    def save(self, path: str | Path, about: dict[str, Any]) -> None:
        """A safetensors file with the tensor `entries` (n, 16) uint8 and, of rounds, `numbers` (m, 4) uint8; `about`
        and the parts go into its header."""
        from safetensors.torch import save_file

        text = json.dumps({**about, "parts": self.parts, "count": self.count})
        save_file(self._tensors(), path, metadata={"format": FORMAT, "about": text, "sha256": self._digest(text)})

    @staticmethod
    def load(path: str | Path) -> tuple[SeedLog, dict[str, Any]]:
        """-> the log, and what `save` was given, with "count": how many scalars there were when it was written. A file
        that was cut short gives the entries, or the rounds, before the cut.

        Raises: EfftuneError for what is no seed log, is cut before its first entry, or was changed since.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise EfftuneError(f"{path} cannot be read ({error.strerror}).") from None
        try:
            (length,) = struct.unpack_from("<Q", data)
            header = json.loads(data[8 : 8 + length])
            metadata, body = header["__metadata__"], data[8 + length :]
            tensors = [header[key] for key in ("entries", "numbers") if key in header]
            if (
                metadata["format"] != FORMAT
                or tensors[0]["data_offsets"][0]
                or any(t["dtype"] != "U8" for t in tensors)
            ):
                raise ValueError
            about = json.loads(metadata["about"])
            parts, count, digest = about.pop("parts"), about["count"], metadata["sha256"]
            found = [body[slice(*tensor["data_offsets"])] for tensor in tensors]
            entries = np.frombuffer(found[0][: len(found[0]) - len(found[0]) % ENTRY.itemsize], ENTRY)
            log = SeedLog(parts, entries)
            if len(found) == 1:
                known = all(isinstance(p["group"], int) and isinstance(p["unused"], list) for p in parts)
            else:
                known = all(isinstance(p["only"], str) for p in parts)
                log._take(found[1])
            if not known or (entries["direction"] >> np.uint64(SEED_BITS) >= len(parts)).any():
                raise ValueError
        except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise EfftuneError(f"{path} is no seed log, or its beginning is damaged; fetch it again.") from None
        if count and not log.count:
            raise EfftuneError(f"{path} is cut before its first entry; fetch it again.")
        if log.count == count and log._digest(metadata["about"]) != digest:
            raise EfftuneError(f"{path} is damaged: it is not what was written; fetch it again.")
        return log, about


def by_group(
    rows: list[tuple[dict[str, Any], int, float]], groups: list[list[tuple[str, nn.Parameter]]]
) -> dict[int, tuple[list[Direction], float, frozenset[int]]]:
    """Sorts one step of a log, as `by_step` yields it, by the group of (name, parameter) pairs that it acts on. Returns
    by group the directions, the decay, and the ids of the parameters that decay. Raises: EfftuneError for a log of
    other groups."""
    found: dict[int, tuple[list[Direction], float, frozenset[int]]] = {}
    for part, seed, scalar in rows:
        index, unused = part["group"], set(part["unused"])
        if index >= len(groups):
            raise EfftuneError(f"The log is of {index + 1} groups of parameters or more, not {len(groups)}.")
        used = frozenset(id(p) for name, p in groups[index] if name not in unused)
        directions, decay, decayed = found.get(index, ([], 1.0, frozenset()))
        if seed == DECAY:
            found[index] = directions, scalar, used
        else:
            c = torch.tensor(scalar, dtype=torch.float32, device="cpu")
            found[index] = [*directions, (seed, c, used)], decay, decayed
    return found


def as_bytes(entries: np.ndarray) -> Tensor:
    """(n, bytes of one) uint8."""
    return torch.from_numpy(entries.view(np.uint8).reshape(-1, entries.itemsize).copy())


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and checksums of all parameters and buffers: equal on all devices."""
    take_back(model)
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
