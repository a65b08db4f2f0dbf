"""The largest scores are those of a stable sort, whatever the tiles, ties and threads."""

import pytest
import torch

from efftune import use_backend
from efftune.ops.topk_entries import topk_entries

INF = float("inf")


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def sorted_out(scores, k):
    return torch.sort(torch.sort(scores.flatten().float(), descending=True, stable=True).indices[:k]).values.int()


SCORES = {
    "normal": normal(97, 301),
    "magnitudes": normal(97, 301).abs(),
    "negative": -normal(97, 301).abs(),
    "many ties": normal(97, 301).round(),
    "all equal": torch.full((97, 301), -3.5),
    "zeros of both signs": torch.zeros(97, 301).copysign(normal(97, 301)),
    "one bin": 1 + torch.rand(97, 301, generator=torch.Generator().manual_seed(1)) * 2**-8,
    "subnormal": normal(97, 301) * 1e-42,
    "bfloat16": normal(97, 301).bfloat16(),
    "infinite": torch.where(normal(97, 301) > 1, INF, torch.where(normal(97, 301) < -1, -INF, normal(97, 301))),
    "strided": normal(301, 97).t(),
    "one": torch.tensor([[2.0]]),
}
BACKENDS = ["cpp", "reference"]


def on(backend, tiles, k):
    with use_backend(backend):
        return topk_entries(tiles, k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCORES)
def test_they_are_those_of_a_stable_sort(name, backend):
    scores = SCORES[name]
    total = scores.numel()
    for k in {k for k in (0, 1, 2, 63, 64, 1000, total // 2, total - 1, total) if k <= total}:
        expected = sorted_out(scores, k)
        for rows in (1, 13, 97):
            result = on(backend, lambda rows=rows: iter(scores.split(rows)), k)
            assert result.dtype == torch.int32 and torch.equal(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCORES)
def test_on_a_gpu(name):
    scores = SCORES[name]
    for k in (1, scores.numel() // 2, scores.numel()):
        if k:
            assert torch.equal(topk_entries(lambda: scores.cuda().split(13), k).cpu(), sorted_out(scores, k))


@pytest.mark.parametrize("name", ["normal", "many ties", "all equal", "one bin"])
def test_any_number_of_threads_and_large_tiles(name):
    scores, before = torch.cat([SCORES[name]] * 20), torch.get_num_threads()  # large enough to be shared by threads
    expected = sorted_out(scores, 70001)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (500, len(scores)):
                assert torch.equal(on("cpp", lambda rows=rows: scores.split(rows), 70001), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_of_any_shape_and_none(backend):
    parts = [torch.ones(2, 3), torch.zeros(0, 5), torch.tensor(4.0), torch.ones(7)]
    assert on(backend, lambda: parts, 3).tolist() == [0, 1, 6]
    assert on(backend, lambda: [torch.zeros(0, 5)], 0).tolist() == on(backend, list, 0).tolist() == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
@pytest.mark.parametrize("at", [0, 77, 199])
def test_nan_is_refused(backend, nan, at):
    scores = torch.ones(200)
    scores[at] = nan
    with pytest.raises(ValueError, match="a score is NaN, neither large nor small"):
        on(backend, lambda: scores.split(64), 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [-1, 13])
def test_a_k_out_of_range_is_refused(backend, k):
    with pytest.raises(ValueError, match=rf"the largest {k} of 12 scores cannot be taken; k is from 0"):
        on(backend, lambda: torch.ones(3, 4), k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "second", [torch.ones(50, 40) * 5, -torch.ones(50, 40), torch.ones(49, 40), torch.ones(51, 40)]
)
def test_other_scores_in_the_second_pass_are_refused(backend, second):
    passes = iter([normal(50, 40), second])
    with pytest.raises(ValueError, match="they have to be the same each time"):
        on(backend, lambda: next(passes).split(20), 300)
    once = iter(normal(50, 40).split(10))
    with pytest.raises(ValueError, match="they have to be the same each time"):
        on(backend, lambda: once, 300)
