"""Device functions for random numbers; efftune/ops/philox.py says which word belongs to which element.

Blocks come as int64 and hold 4, 8 or 128 consecutive elements each; a program covers whole blocks, so no two threads
compute the same one.
"""

import triton
import triton.language as tl

GAUSSIAN: tl.constexpr = tl.constexpr(0)
SIGN: tl.constexpr = tl.constexpr(1)
ROUNDING: tl.constexpr = tl.constexpr(2)
DROPOUT: tl.constexpr = tl.constexpr(3)
ORDER: tl.constexpr = tl.constexpr(4)
UNIFORM: tl.constexpr = tl.constexpr(5)


@triton.jit
def words(seed, block, stream, purpose: tl.constexpr):
    """Four uint32 words of each block. seed: int64; block: (B,) int64; stream: int32 bits."""
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    stream = (tl.zeros_like(low).to(tl.int32, bitcast=True) + stream).to(tl.uint32, bitcast=True)
    return tl.philox(seed, low, high, stream, tl.zeros_like(low) + purpose)


@triton.jit
def quad(a, b, c, d):
    """(B,) four times -> (B, 2, 2), whose flat order is a0 b0 c0 d0 a1 ...; stays in registers."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def log_positive(u):
    """Natural logarithm of a normal positive float32: Cephes' logf, as in csrc/philox.h."""
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    m = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    e = k.to(tl.float32)
    sq = m * m
    y = m * 7.0376836292e-2 - 1.1514610310e-1
    y = y * m + 1.1676998740e-1
    y = y * m - 1.2420140846e-1
    y = y * m + 1.4249322787e-1
    y = y * m - 1.6668057665e-1
    y = y * m + 2.0000714765e-1
    y = y * m - 2.4999993993e-1
    y = y * m + 3.3333331174e-1
    y = y * m * sq + e * -2.12194440e-4 - 0.5 * sq
    return m + y + e * 0.693359375


@triton.jit
def box_muller(w0, w1):
    """Two independent normal numbers from two words: radius from w0, angle (in turns of 2^-32) from w1."""
    u = (w0.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # The log may leave -0 or, fused, a positive rounding error at u = 1; a negative radicand would be NaN.
    radius = tl.sqrt(tl.maximum(-2.0 * log_positive(u), 0.0))
    quadrant = (w1 + 0x20000000) >> 30
    t = (w1 - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.46291807926715968e-9
    sq = t * t
    s = ((-1.9515295891e-4 * sq + 8.3321608736e-3) * sq - 1.6666654611e-1) * sq * t + t
    c = (2.443315711809948e-5 * sq - 1.388731625493765e-3) * sq + 4.166664568298827e-2
    c = c * sq * sq - 0.5 * sq + 1.0
    swap = (quadrant & 1) != 0
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    return (
        radius * tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine),
        radius * tl.where((quadrant & 2) != 0, -sine, sine),
    )


@triton.jit
def normal(seed, block, stream):
    """(B,) blocks of 4 offsets -> (4 B,) normal float32, in the order of the offsets."""
    w0, w1, w2, w3 = words(seed, block, stream, GAUSSIAN)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return quad(z0, z1, z2, z3)


@triton.jit
def sign(seed, block, stream, BLOCKS: tl.constexpr):
    """(B,) blocks of 128 offsets -> (128 B,) float32 of ±1, in the order of the offsets."""
    w0, w1, w2, w3 = words(seed, block, stream, SIGN)
    each = tl.reshape(quad(w0, w1, w2, w3), (BLOCKS * 4, 1))
    bits = (each >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
    return tl.reshape(bits.to(tl.float32) * 2.0 - 1.0, (BLOCKS * 128,))


@triton.jit
def rounding(seed, block, stream):
    """(B,) blocks of 8 offsets -> (B, 2, 2, 2) random 16-bit numbers in int32, flat in the order of the offsets."""
    w0, w1, w2, w3 = words(seed, block, stream, ROUNDING)
    both = quad(w0, w1, w2, w3)
    return tl.join(both & 0xFFFF, both >> 16).to(tl.int32)


@triton.jit
def round_stochastic(x, random, DTYPE: tl.constexpr):
    """float32 x to bfloat16 or float16, up in magnitude with probability = the dropped fraction; random: 16 bits."""
    if DTYPE == tl.bfloat16:
        bits = (x.to(tl.int32, bitcast=True) + random) & -65536
        rounded = bits.to(tl.float32, bitcast=True)
        return tl.where(tl.abs(x) < float("inf"), rounded, x).to(DTYPE)
    else:
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        exponent = tl.minimum(tl.maximum(magnitude >> 23, 113), 143)
        step = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
        scaled = tl.abs(x) * ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        whole = tl.floor(scaled)
        up = (random.to(tl.float32) + 0.5) * 1.52587890625e-05 < scaled - whole
        rounded = (whole + up.to(tl.float32)) * step
        return tl.where(tl.abs(x) < 65536.0, tl.where(x < 0, -rounded, rounded), x).to(DTYPE)
