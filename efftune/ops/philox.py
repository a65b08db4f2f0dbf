"""Philox4x32-10 (Salmon et al., SC 2011) in torch: what the random operators draw, defined by formulas.

key = (seed low, seed high); counter = (block low, block high, stream, purpose). The number at an element depends on
(seed, stream, offset) alone; `purpose` separates what is drawn, and consecutive offsets share a block:

| purpose  | block       | the element's part of the four words w0..w3                                      |
|----------|-------------|-----------------------------------------------------------------------------------|
| GAUSSIAN | offset >> 2 | Box–Muller: (w0, w1) → offsets 4b (cos), 4b+1 (sin); (w2, w3) → 4b+2, 4b+3       |
| SIGN     | offset >> 7 | bit offset & 31 of word (offset >> 5) & 3; set → +1                               |
| ROUNDING | offset >> 3 | half offset & 1 (low first) of word (offset >> 1) & 3                             |
| DROPOUT  | offset >> 2 | word offset & 3                                                                   |
| ORDER    | offset >> 2 | word offset & 3: sorting elements by it puts them into a random order             |
| UNIFORM  | offset >> 1 | 53 bits: word 2(offset & 1), then the upper 21 bits of the word behind it         |

Integers are held in int64: torch has few uint32 operations. Products below wrap modulo 2^64, as wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GAUSSIAN, SIGN, ROUNDING, DROPOUT, ORDER, UNIFORM = range(6)

_LOW = 0xFFFFFFFF

Words = Callable[[int, Tensor, int, int], tuple[Tensor, ...]]
Device = torch.device | str


def philox(seed: int, block: Tensor, stream: int, purpose: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each block, as int64 in [0, 2^32). block: int64, non-negative."""
    return philox_words(block & _LOW, block >> 32, stream, purpose, seed & _LOW, (seed >> 32) & _LOW)


def philox_words(c0, c1, c2, c3, k0: int, k1: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on a counter of four words with a key of two."""
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _words(
    purpose: int, per: int, seed: int, stream: int, start: int, count: int, device: Device, philox: Words = philox
) -> tuple[Tensor, ...]:
    """The four words of each block, `per` elements each, that `count` elements from `start` on lie in."""
    blocks = torch.arange(start // per, (start + count + per - 1) // per, device=device)
    return philox(seed, blocks, stream, purpose)


def _elements(each: Tensor, start: int, count: int) -> Tensor:
    """Those of the elements of whole blocks, (blocks, elements of a block), which begin with the one of `start`."""
    return each.flatten()[start % each.shape[1] :][:count]


# Of `count` elements from offset `start` on, (count,): each block is drawn once.


def normal(seed: int, stream: int, start: int, count: int, device: Device = "cpu") -> Tensor:
    """z ~ N(0, 1) in float64; |z| ≤ 6.77. u = (w0 + ½)·2⁻³² is rounded to float32."""
    words = torch.stack(_words(GAUSSIAN, 4, seed, stream, start, count, device), 1)  # (blocks, 4)
    u = (words[:, 0::2].to(torch.float32) + 0.5) * 2.0**-32
    angle = words[:, 1::2].to(torch.float64) * (2 * math.pi / 2**32)
    radius = torch.sqrt(-2 * torch.log(u.to(torch.float64)))
    return _elements(torch.stack((radius * angle.cos(), radius * angle.sin()), 2).flatten(1), start, count)


def sign(seed: int, stream: int, start: int, count: int, device: Device = "cpu") -> Tensor:
    """±1 in float64, each with probability ½."""
    words = torch.stack(_words(SIGN, 128, seed, stream, start, count, device), 1)
    bits = words[:, :, None] >> torch.arange(32, device=device) & 1
    return _elements(bits.flatten(1), start, count).to(torch.float64) * 2 - 1


def rounding_bits(seed: int, stream: int, start: int, count: int, device: Device = "cpu") -> Tensor:
    """16 random bits, int64."""
    words = torch.stack(_words(ROUNDING, 8, seed, stream, start, count, device), 1)
    return _elements(torch.stack((words & 0xFFFF, words >> 16), 2).flatten(1), start, count)


def dropout_word(seed: int, stream: int, start: int, count: int, device: Device = "cpu") -> Tensor:
    """32 random bits, int64."""
    return _elements(torch.stack(_words(DROPOUT, 4, seed, stream, start, count, device), 1), start, count)


def order_word(
    seed: int, stream: int, start: int, count: int, device: Device = "cpu", philox: Words = philox
) -> Tensor:
    """32 random bits, int64."""
    return _elements(torch.stack(_words(ORDER, 4, seed, stream, start, count, device, philox), 1), start, count)


def uniform(seed: int, stream: int, start: int, count: int, device: Device = "cpu", philox: Words = philox) -> Tensor:
    """u in [0, 1), a multiple of 2⁻⁵³ in float64."""
    words = torch.stack(_words(UNIFORM, 2, seed, stream, start, count, device, philox), 1)
    bits = (words[:, 0::2] << 21) | (words[:, 1::2] >> 11)
    return _elements(bits, start, count).to(torch.float64) * 2.0**-53


def round_stochastic(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """float32 x rounded to bfloat16 or float16, up in magnitude with probability = the dropped fraction; float32
    and float64 stay as they are. bits: 16 random bits for each element."""
    if dtype == torch.bfloat16:
        raw = x.contiguous().view(torch.int32)
        rounded = ((raw + bits.to(torch.int32)) & -65536).view(torch.float32)
    elif dtype == torch.float16:
        step = torch.exp2(torch.frexp(x).exponent.clamp(min=-13).to(torch.float32) - 11)
        scaled = x.abs() / step
        up = (bits.to(torch.float32) + 0.5) * 2.0**-16 < scaled - scaled.floor()
        rounded = torch.copysign((scaled.floor() + up) * step, x)
    else:
        return x.to(dtype)
    return torch.where(x.abs() < (65536.0 if dtype == torch.float16 else math.inf), rounded, x).to(dtype)
