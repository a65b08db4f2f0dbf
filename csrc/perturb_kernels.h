// One tile of w + a z. Compiled once per instruction set by multiversion.h, hence no include guard and no headers.

#include "philox_lanes.h"

constexpr int kBatch = 64;  // blocks at a time: their words stay in the first-level cache

// z[i] of tile-relative element i for i < count; the tile starts at a multiple of kTile.
static inline void fill_normal(float* z, int count, uint64_t seed, uint64_t first, uint32_t stream) {
    alignas(64) uint32_t words[4][kBatch];
    for (int b = 0; 4 * b < count; b += kBatch) {
        fill_words(words, kBatch, seed, first / 4 + b, stream, kGaussian);
#pragma omp simd
        for (int j = 0; j < kBatch; ++j) {
            const Pair p = box_muller(words[0][j], words[1][j]), q = box_muller(words[2][j], words[3][j]);
            float* at = z + 4 * (b + j);
            at[0] = p.even, at[1] = p.odd, at[2] = q.even, at[3] = q.odd;
        }
    }
}

static inline void fill_sign(float* z, int count, uint64_t seed, uint64_t first, uint32_t stream) {
    constexpr int kBlocks = kTile / 128;
    alignas(64) uint32_t words[4][kBlocks];
    fill_words(words, kBlocks, seed, first / 128, stream, kSign);
    for (int word = 0; 32 * word < count; ++word) {
        const uint32_t bits = words[word & 3][word >> 2];
#pragma omp simd
        for (int j = 0; j < 32; ++j) z[32 * word + j] = as_float(0xBF800000u ^ ((bits >> j) << 31));
    }
}

static inline void fill_rounding(uint16_t* random, int count, uint64_t seed, uint64_t first, uint32_t stream) {
    alignas(64) uint32_t words[4][kBatch];
    for (int b = 0; 8 * b < count; b += kBatch) {
        fill_words(words, kBatch, seed, first / 8 + b, stream, kRounding);
        for (int j = 0; j < kBatch; ++j) {
            uint32_t block[4] = {words[0][j], words[1][j], words[2][j], words[3][j]};
            memcpy(random + 8 * (b + j), block, sizeof block);  // little endian: low half first
        }
    }
}

template <class T>
static inline void add_scaled(const void* w_ptr, void* out_ptr, int64_t at, int from, int to, float a, const float* z,
                              const uint16_t* random, bool stochastic) {
    const auto* w = static_cast<const typename T::Storage*>(w_ptr) + at;
    auto* out = static_cast<typename T::Storage*>(out_ptr) + at;
    if (stochastic) {
#pragma omp simd
        for (int i = from; i < to; ++i) out[i] = T::store_stochastic(T::load(w[i]) + a * z[i], random[i]);
    } else {
#pragma omp simd
        for (int i = from; i < to; ++i) out[i] = T::store(T::load(w[i]) + a * z[i]);
    }
}

// Elements [from, to) of the tile that starts at offset `first`; w and out are indexed by `at + i`.
__attribute__((noinline)) static void perturb_tile(const PerturbArgs& p, uint64_t first, int64_t at, int from, int to) {
    alignas(64) float z[kTile];
    alignas(64) uint16_t random[kTile];
    (p.sign ? fill_sign : fill_normal)(z, to, p.seed, first, p.stream);
    const bool stochastic = p.stochastic && p.dtype != Dtype::kFloat32;
    if (stochastic) fill_rounding(random, to, p.seed, first, p.stream);
    switch (p.dtype) {
        case Dtype::kFloat32:
            return add_scaled<Float32>(p.w, p.out, at, from, to, p.a, z, random, false);
        case Dtype::kBFloat16:
            return add_scaled<BFloat16>(p.w, p.out, at, from, to, p.a, z, random, stochastic);
        case Dtype::kFloat16:
            return add_scaled<Float16>(p.w, p.out, at, from, to, p.a, z, random, stochastic);
    }
}
