"""The tiles of logits: the kernel by itself, and how vocabulary and tokens are cut."""

import pytest
import torch

import efftune.ops.linear_cross_entropy as module
from tests.budget import assert_within_budget


def test_tiles_of_logits_and_their_gradient():
    """The kernel by itself."""
    g = torch.Generator().manual_seed(0)
    z, bias = 3 * torch.randn(9, 2311, generator=g), torch.randn(2311, generator=g)
    targets, dy = torch.randint(2311, (9,), generator=g), torch.randn(9, generator=g)
    targets[4] = -100
    results = []
    for tile, wide in ((module._torch_tile, torch.float64), (module._cpp_tile, torch.float32)):
        loss, norm, out = torch.empty(9, dtype=wide), torch.empty(2, 9, dtype=wide), z.to(wide, copy=True)
        tile(out, bias.to(wide), targets, norm, loss, dy.to(wide), out, 0, 2311, -100, 3.0, 0.1)
        results.append((loss, norm, out))
    for oracle, result in zip(*results, strict=True):
        assert_within_budget(result, oracle, oracle.float() * (1 + 2**-22))


@pytest.mark.parametrize("step", [1, 5, 16, 50, 64, 192, 256, 1024, 1280, 4096])
def test_blocks_cover_the_whole_and_none_is_small(step):
    totals = (0, 1, step - 1, step, step + 1, 3 * step // 2 - 1, 2 * step + step // 2, 2 * step + 1, 50257)
    for total in totals:
        blocks = module._blocks(total, step)
        sizes = [b - a for a, b in blocks]
        assert [a for a, _ in blocks] == [0, *(b for _, b in blocks)][: len(blocks)]
        assert sum(sizes) == total and len(blocks) == -(-total // step)
        assert max(sizes, default=0) <= step and set(sizes[:-2]) <= {step}
        if len(sizes) > 1:
            assert sizes[-1] >= step / 2 and sizes[-2] >= step / 4
        multiple = 256 if step >= 1024 else 16 if step >= 64 else 1
        assert all(size % multiple == 0 for size in sizes[:-1] if step % multiple == 0)


@pytest.mark.parametrize("vocabulary", [32000, 50257, 128256, 131072, 151936, 262144])
@pytest.mark.parametrize("m", [1, 100, 1000, 4096, 8192, 2**15, 2**17])
def test_blocks_on_a_gpu(m, vocabulary):
    """Aligned products of at least 1024 columns, and no more memory than is documented."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    step, tokens = module._columns(m, vocabulary, gpu), module._tokens(m, vocabulary, gpu)
    assert m * step <= max(2**23, 1024 * m) and tokens * vocabulary <= max(2**27, 16 * vocabulary)
    assert module._columns(m, vocabulary, cpu) * m <= max(2**23, 256 * m)
    assert step == vocabulary or (step % 256 == 0 and step >= 1024)
    for blocks, multiple in ((module._blocks(vocabulary, step), 256), (module._blocks(m, tokens), 16)):
        assert all((b - a) % multiple == 0 for a, b in blocks[:-1])
