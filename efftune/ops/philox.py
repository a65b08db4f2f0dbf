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


def _gather_word(words: tuple[Tensor, ...], which: Tensor) -> Tensor:
    return torch.stack(words).gather(0, which[None]).squeeze(0)


def normal(seed: int, stream: int, offset: Tensor) -> Tensor:
    """z ~ N(0, 1) in float64 for each int64 offset; |z| ≤ 6.77. u = (w0 + ½)·2⁻³² is rounded to float32."""
    words = torch.stack(philox(seed, offset >> 2, stream, GAUSSIAN))
    pair = ((offset >> 1) & 1)[None] * 2
    radius_word, angle_word = words.gather(0, pair).squeeze(0), words.gather(0, pair + 1).squeeze(0)
    u = (radius_word.to(torch.float32) + 0.5) * 2.0**-32
    angle = angle_word.to(torch.float64) * (2 * math.pi / 2**32)
    return torch.sqrt(-2 * torch.log(u.to(torch.float64))) * torch.where(offset & 1 == 0, angle.cos(), angle.sin())


def sign(seed: int, stream: int, offset: Tensor) -> Tensor:
    """±1 in float64, each with probability ½, for each int64 offset."""
    word = _gather_word(philox(seed, offset >> 7, stream, SIGN), (offset >> 5) & 3)
    return ((word >> (offset & 31)) & 1).to(torch.float64) * 2 - 1


def rounding_bits(seed: int, stream: int, offset: Tensor) -> Tensor:
    """16 random bits, int64, for each int64 offset."""
    word = _gather_word(philox(seed, offset >> 3, stream, ROUNDING), (offset >> 1) & 3)
    return (word >> (16 * (offset & 1))) & 0xFFFF


def rounding_bits_from(seed: int, stream: int, offset: int, count: int, device: torch.device) -> Tensor:
    """`rounding_bits` of `count` offsets from `offset` on, (count,): each block is drawn once for its eight."""
    words = philox(seed, torch.arange(offset >> 3, (offset + count + 7) >> 3, device=device), stream, ROUNDING)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], 1)
    return halves.flatten()[offset & 7 : (offset & 7) + count]


def dropout_word(seed: int, stream: int, offset: Tensor) -> Tensor:
    """32 random bits, int64, for each int64 offset."""
    return _gather_word(philox(seed, offset >> 2, stream, DROPOUT), offset & 3)


def order_word(seed: int, stream: int, offset: Tensor, philox: Words = philox) -> Tensor:
    """32 random bits, int64, for each int64 offset."""
    return _gather_word(philox(seed, offset >> 2, stream, ORDER), offset & 3)


def uniform(seed: int, stream: int, offset: Tensor, philox: Words = philox) -> Tensor:
    """u in [0, 1), a multiple of 2⁻⁵³ in float64, for each int64 offset."""
    words, first = philox(seed, offset >> 1, stream, UNIFORM), 2 * (offset & 1)
    bits = (_gather_word(words, first) << 21) | (_gather_word(words, first + 1) >> 11)
    return bits.to(torch.float64) * 2.0**-53


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
