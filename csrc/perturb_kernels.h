// One tile of w + Σ a z. Compiled once per instruction set by multiversion.h, hence no include guard and no headers.

#include "philox_lanes.h"

constexpr int kBatch = 64;  // blocks at a time: their words stay in the first-level cache
constexpr int kSignBlocks = kTile / 128;

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
    alignas(64) uint32_t words[4][kSignBlocks];
    fill_words(words, kSignBlocks, seed, first / 128, stream, kSign);
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

// to_i = from_i + a z_i, rounded on the way.
template <class From, class To>
static inline void add_scaled(const typename From::Storage* w, typename To::Storage* out, int from, int to, float a,
                              const float* z, const uint16_t* random, bool stochastic) {
    if (stochastic) {
#pragma omp simd
        for (int i = from; i < to; ++i) out[i] = To::store_stochastic(From::load(w[i]) + a * z[i], random[i]);
    } else {
#pragma omp simd
        for (int i = from; i < to; ++i) out[i] = To::store(From::load(w[i]) + a * z[i]);
    }
}

// sum_i += a_k z(seed_k)_i for N seeds of signs, one after the other. A sign costs less than to load and store a sum.
template <int N>
static inline void add_signs(float* sum, int count, const float* a, const uint64_t* seeds, uint64_t first,
                             uint32_t stream) {
    alignas(64) uint32_t words[N][4][kSignBlocks];
    for (int k = 0; k < N; ++k) fill_words(words[k], kSignBlocks, seeds[k], first / 128, stream, kSign);
    for (int word = 0; 32 * word < count; ++word) {
        float* at = sum + 32 * word;
#pragma omp simd
        for (int j = 0; j < 32; ++j) {
            float y = at[j];
#pragma GCC unroll 8
            for (int k = 0; k < N; ++k) {
                const uint32_t minus = ~words[k][word & 3][word >> 2] << (31 - j) & 0x80000000u;
                y += as_float(as_bits(a[k]) ^ minus);
            }
            at[j] = y;
        }
    }
}

// out_i = sum_i, rounded, where |w_i| <= threshold, else w_i.
template <class T>
static inline void store_small(const typename T::Storage* w, typename T::Storage* out, int from, int to,
                               const float* sum, float threshold, const uint16_t* random, bool stochastic) {
#pragma omp simd
    for (int i = from; i < to; ++i) {
        const typename T::Storage before = w[i];
        const typename T::Storage y = stochastic ? T::store_stochastic(sum[i], random[i]) : T::store(sum[i]);
        out[i] = fabsf(T::load(before)) <= threshold ? y : before;
    }
}

static inline void fill(float* z, int count, bool sign, uint64_t seed, uint64_t first, uint32_t stream) {
    (sign ? fill_sign : fill_normal)(z, count, seed, first, stream);
}

template <class T>
static inline void perturb_tile_of(const PerturbArgs& p, uint64_t first, int64_t at, int from, int to) {
    alignas(64) float z[kTile];
    alignas(64) uint16_t random[kTile];
    const auto* w = static_cast<const typename T::Storage*>(p.w) + at;
    auto* out = static_cast<typename T::Storage*>(p.out) + at;
    const bool stochastic = p.stochastic && p.draws > 0 && p.dtype != Dtype::kFloat32;
    if (stochastic) fill_rounding(random, to, p.seed, first, p.stream);
    if (p.draws == 1 && p.threshold == INFINITY) {  // without the sums
        fill(z, to, p.sign, p.seed, first, p.stream);
        return add_scaled<T, T>(w, out, from, to, p.a[0], z, random, stochastic);
    }
    alignas(64) float sum[kTile];
    if (to - from < kTile) memset(sum, 0, sizeof sum);  // add_signs takes 32 at a time
#pragma omp simd
    for (int i = from; i < to; ++i) sum[i] = T::load(w[i]);
    int64_t k = 0;
    if (p.sign) {
        for (; k + 8 <= p.draws; k += 8) add_signs<8>(sum, to, p.a + k, p.seeds + k, first, p.stream);
        for (; k < p.draws; ++k) add_signs<1>(sum, to, p.a + k, p.seeds + k, first, p.stream);
    }
    for (; k < p.draws; ++k) {
        fill_normal(z, to, p.seeds[k], first, p.stream);
        add_scaled<Float32, Float32>(sum, sum, from, to, p.a[k], z, random, false);
    }
    store_small<T>(w, out, from, to, sum, p.threshold, random, stochastic);
}

// Elements [from, to) of the tile that starts at offset `first`; w and out are indexed by `at + i`.
__attribute__((noinline)) static void perturb_tile(const PerturbArgs& p, uint64_t first, int64_t at, int from, int to) {
    visit(p.dtype, [&](auto type) { perturb_tile_of<decltype(type)>(p, first, at, from, to); });
}

// What perturb_tile draws, into the first-level cache and no further. Something of each tile is used, or the compiler
// would leave out the rest.
__attribute__((noinline)) static float draw_tile(const PerturbArgs& p, uint64_t first, int to) {
    alignas(64) float z[kTile];
    float used = 0.0f;
    for (int64_t k = 0; k < p.draws; ++k) {
        fill(z, to, p.sign, p.seeds[k], first, p.stream);
        used += z[p.seeds[k] % kTile];
    }
    return used;
}
