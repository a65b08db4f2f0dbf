// Philox4x32-10 (Salmon et al., SC 2011) and what is made of its words. Shared by the C++ and the CUDA kernels;
// triton_kernels/philox.py and efftune/ops/philox.py compute the same.
//
// The CPU build switches floating-point contraction off: with it on, the vector body and the scalar tail of one loop,
// or two instruction sets, could differ in the last bit, and a replayed run would drift.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define EFFTUNE_INLINE __host__ __device__ __forceinline__
#else
#include <cmath>
#define EFFTUNE_INLINE inline __attribute__((always_inline))
#endif

namespace efftune {

enum Purpose : uint32_t { kGaussian = 0, kSign = 1, kRounding = 2, kDropout = 3, kOrder = 4, kUniform = 5 };

struct Words {
    uint32_t w0, w1, w2, w3;
};

EFFTUNE_INLINE Words philox(uint64_t seed, uint64_t block, uint32_t stream, uint32_t purpose) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = stream, c3 = purpose;
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

EFFTUNE_INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

EFFTUNE_INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// Natural logarithm of a normal positive float: Cephes' logf, 1 ulp, and exact relative to u near 1.
EFFTUNE_INLINE float log_positive(float u) {
    const int32_t k = static_cast<int32_t>(as_bits(u) - 0x3F3504F3u) >> 23;  // u = m 2^k, m in [sqrt(1/2), sqrt(2))
    const float m = as_float(as_bits(u) - (static_cast<uint32_t>(k) << 23)) - 1.0f;
    const float e = static_cast<float>(k), sq = m * m;
    float y = 7.0376836292e-2f;
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * sq + e * -2.12194440e-4f - 0.5f * sq;
    return m + y + e * 0.693359375f;
}

struct Pair {
    float even, odd;
};

// Two independent normal numbers from two words: radius from w0, angle (in turns of 2^-32) from w1. The angle is
// reduced to +-1/8 turn on integers, which is exact; the polynomials are Cephes' sinf and cosf.
EFFTUNE_INLINE Pair box_muller(uint32_t w0, uint32_t w1) {
    const float u = (static_cast<float>(w0) + 0.5f) * 0x1p-32f;  // in (0, 1]
    const float radius = sqrtf(-2.0f * log_positive(u));
    const uint32_t quadrant = (w1 + 0x20000000u) >> 30;
    const float t = static_cast<float>(static_cast<int32_t>(w1 - (quadrant << 30))) * 1.46291807926715968e-9f;
    const float sq = t * t;
    const float s = ((-1.9515295891e-4f * sq + 8.3321608736e-3f) * sq - 1.6666654611e-1f) * sq * t + t;
    const float c = ((2.443315711809948e-5f * sq - 1.388731625493765e-3f) * sq + 4.166664568298827e-2f) * sq * sq -
                    0.5f * sq + 1.0f;
    const bool swap = quadrant & 1u;
    const uint32_t cos_bits = as_bits(swap ? s : c) ^ (((quadrant + 1u) & 2u) << 30);
    const uint32_t sin_bits = as_bits(swap ? c : s) ^ ((quadrant & 2u) << 30);
    return {radius * as_float(cos_bits), radius * as_float(sin_bits)};
}

}  // namespace efftune
