"""The generator itself: published answers, and the reference against formulas written out element by element."""

import math
import re
from pathlib import Path

import pytest
import torch

from efftune.ops import philox

# Random123's known-answer tests for Philox4x32-10: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter, key, words):
    assert [int(w) for w in philox.philox_words(*(torch.tensor([c]) for c in counter), *key)] == words


def scalar_words(seed, block, stream, purpose):
    c, mask = [block & 0xFFFFFFFF, block >> 32, stream, purpose], 0xFFFFFFFF
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & mask, (p0 >> 32) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


@pytest.mark.parametrize("seed, stream, offset", [(0, 0, 0), (-1, 2**32 - 1, 2**40 + 5), (2**62 + 3, 2**31, 2**33 - 3)])
def test_layout(seed, stream, offset):
    place = seed, stream, offset, 300
    normal, sign, bits, word, order, uniform = (
        draw(*place)
        for draw in (
            philox.normal, philox.sign, philox.rounding_bits, philox.dropout_word, philox.order_word, philox.uniform,
        )
    )  # fmt: skip
    assert all(len(drawn) == 300 for drawn in (normal, sign, bits, word, order, uniform))
    for i, o in enumerate(range(offset, offset + 300)):
        w = scalar_words(seed, o >> 2, stream, philox.GAUSSIAN)
        w0, w1 = w[2:] if o & 2 else w[:2]
        u = (torch.tensor(float(w0), dtype=torch.float32) + 0.5).item() * 2.0**-32
        angle = 2 * math.pi * w1 / 2**32
        expected = math.sqrt(-2 * math.log(u)) * (math.sin(angle) if o & 1 else math.cos(angle))
        assert normal[i].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        w = scalar_words(seed, o >> 7, stream, philox.SIGN)
        assert sign[i].item() == 2 * (w[(o >> 5) & 3] >> (o & 31) & 1) - 1
        w = scalar_words(seed, o >> 3, stream, philox.ROUNDING)
        assert bits[i].item() == w[(o >> 1) & 3] >> 16 * (o & 1) & 0xFFFF
        assert word[i].item() == scalar_words(seed, o >> 2, stream, philox.DROPOUT)[o & 3]
        assert order[i].item() == scalar_words(seed, o >> 2, stream, philox.ORDER)[o & 3]
        w = scalar_words(seed, o >> 1, stream, philox.UNIFORM)[2 * (o & 1) :]
        assert uniform[i].item() == ((w[0] << 32 | w[1]) >> 11) / 2**53


def test_purposes_differ():
    block = torch.arange(100)
    drawn = [philox.philox(7, block, 1, purpose)[0] for purpose in range(6)]
    assert all((a != b).all() for i, a in enumerate(drawn) for b in drawn[:i])


def test_purposes_have_the_same_numbers_everywhere():
    names = ["GAUSSIAN", "SIGN", "ROUNDING", "DROPOUT", "ORDER", "UNIFORM"]
    header = (Path(__file__).parents[2] / "csrc" / "philox.h").read_text()
    found = re.findall(r"k(\w+) = (\d+)", re.search(r"enum Purpose : uint32_t {(.*?)}", header)[1])
    assert found == [(name.capitalize(), str(i)) for i, name in enumerate(names)]
    assert [getattr(philox, name) for name in names] == list(range(len(names)))
    triton_philox = pytest.importorskip("efftune.triton_kernels.philox")
    assert [getattr(triton_philox, name).value for name in names] == list(range(len(names)))
