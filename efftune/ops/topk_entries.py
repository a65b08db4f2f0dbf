"""The largest of the scores of a matrix that comes in tiles of rows, without a sort and without the whole matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from efftune.ops._available import extension
from efftune.ops._op import forced_backend

SHIFT, BINS = 17, 2**15  # a bin is a score's sign, exponent and six bits more


def topk_entries(tiles: Callable[[], Iterable[Tensor]], k: int) -> Tensor:
    """The indices of the k largest scores; of equal ones those of the smallest indices are taken.

    Scores are asked for twice: for a histogram by their upper 15 bits, and for what lies above the bin with the k-th
    score, and within it.

    Args:
        tiles: called twice, gives the scores each time: tensors that follow one another, of any shapes, f32 (others are
            rounded to it).   k: from 0 to the number of scores, of which there are fewer than 2^31.
    Returns: (k,) int32, sorted: places in the row of all scores.
    Numerics: exactly k, the same for any number of threads and on every device; -0 is 0.
    Memory: of the size of a tile and of k.
    Raises: ValueError for NaN, for a k out of range, and if the second call gives other scores.
    """
    bins, total = None, 0
    for tile in tiles():
        scores = _flat(tile)
        if bins is None:
            bins = torch.zeros(BINS, dtype=torch.int64, device=scores.device)
        if _count(scores, bins):
            raise ValueError("a score is NaN, neither large nor small; look for NaN in the weights and gradients.")
        total += len(scores)
    if not 0 <= k <= total or total >= 2**31:
        raise ValueError(f"the largest {k} of {total} scores cannot be taken; k is from 0 to their number, below 2^31.")
    if bins is None or k == 0:
        return torch.empty(0, dtype=torch.int32, device=None if bins is None else bins.device)
    at_least = bins.flip(0).cumsum(0).flip(0)  # how many there are in a bin and above
    edge = int((at_least >= k).sum()) - 1
    found = _Found(edge, k - int(at_least[edge] - bins[edge]), k, bins.device)
    first = 0
    for tile in tiles():
        scores = _flat(tile)
        found.add(scores, first)
        first += len(scores)
    if first != total or found.counts.tolist() != [k - found.need, found.need]:
        raise ValueError("the second pass over the scores gave other ones; they have to be the same each time.")
    return found.merged()


class _Found:
    """What lies above the bin `edge`, and the best `need` within it."""

    def __init__(self, edge: int, need: int, k: int, device: torch.device):
        self.edge, self.need = edge, need
        self.above = torch.empty(k - need, dtype=torch.int32, device=device)
        # A number each: how far below the end of the bin, << 32, and the index. The smaller, the better.
        self.within = torch.empty(need, dtype=torch.int64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64)

    def add(self, scores: Tensor, first: int) -> None:
        if _compiled(scores):
            rooms = self.above.data_ptr(), len(self.above), self.within.data_ptr(), self.need, self.counts.data_ptr()
            given = scores.data_ptr(), len(scores), first, self.edge
            extension("_cpu").topk_collect(*given, *rooms, torch.get_num_threads())
            return
        keys, (a, b) = _keys(scores), self.counts.tolist()
        bins = keys >> SHIFT
        above = (bins > self.edge).nonzero().view(-1) + first
        if a + len(above) <= len(self.above):
            self.above[a : a + len(above)] = above
        at = (bins == self.edge).nonzero().view(-1)
        ranks = ((self.edge + 1 << SHIFT) - 1 - keys[at] << 32) + at + first
        within = torch.cat([self.within[:b], ranks])
        if len(within) > self.need:
            within = within[within <= within.kthvalue(self.need).values]  # still in the order of indices
        self.within[: len(within)] = within
        self.counts[:] = torch.tensor([a + len(above), len(within)])

    def merged(self) -> Tensor:
        """Sorted, as both parts are: to sort them together took longer than the two passes."""
        out = self.above.new_empty(len(self.above) + self.need)
        if _compiled(out):
            rooms = self.above.data_ptr(), len(self.above), self.within.data_ptr(), self.need
            extension("_cpu").topk_merge(*rooms, out.data_ptr())
            return out
        within = (self.within & 0x7FFFFFFF).int()
        at = torch.searchsorted(self.above, within) + torch.arange(self.need, device=within.device)
        rest = torch.ones_like(out, dtype=torch.bool)
        rest[at] = False
        out[at], out[rest] = within, self.above
        return out


def _flat(tile: Tensor) -> Tensor:
    return tile.detach().float().contiguous().view(-1)


def _compiled(scores: Tensor) -> bool:
    return scores.is_cpu and extension("_cpu") is not None and forced_backend() in (None, "cpp")


def _keys(scores: Tensor) -> Tensor:
    """int64 in [0, 2^32) that are in the order of the scores."""
    bits = (scores + 0.0).view(torch.int32).long()  # -0 is 0
    return torch.where(bits < 0, -1 - bits, bits + 2**31)


def _count(scores: Tensor, bins: Tensor) -> bool:
    """Adds the scores to the bins; whether one is NaN."""
    if _compiled(scores):
        given = scores.data_ptr(), len(scores), bins.data_ptr()
        return bool(extension("_cpu").topk_count(*given, torch.get_num_threads()))
    bins += torch.bincount(_keys(scores) >> SHIFT, minlength=BINS)
    return bool(scores.isnan().any())
