// One tile of dropout. Compiled once per instruction set by multiversion.h, hence no include guard and no headers.

#include "philox_lanes.h"

template <class T>
static inline void dropout_batch(const DropoutArgs& d, int64_t at, int count, const uint32_t* words) {
    const auto* x = static_cast<const typename T::Storage*>(d.x) + at;
    auto* out = static_cast<typename T::Storage*>(d.out) + at;
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const auto kept = T::store(T::load(x[i]) * d.scale);
        out[i] = words[i] >= d.threshold ? kept : typename T::Storage{0};
    }
}

__attribute__((noinline)) static void dropout_tile(const DropoutArgs& d, int64_t at, int count) {
    constexpr int kBatch = 64;
    alignas(64) uint32_t words[4][kBatch], ordered[4 * kBatch];
    for (int i = 0; i < count; i += 4 * kBatch) {
        fill_words(words, kBatch, d.seed, static_cast<uint64_t>(at + i) / 4, d.stream, kDropout);
#pragma omp simd
        for (int j = 0; j < kBatch; ++j) {
            ordered[4 * j] = words[0][j], ordered[4 * j + 1] = words[1][j];
            ordered[4 * j + 2] = words[2][j], ordered[4 * j + 3] = words[3][j];
        }
        const int left = count - i < 4 * kBatch ? count - i : 4 * kBatch;
        visit(d.dtype, [&](auto type) { dropout_batch<decltype(type)>(d, at + i, left, ordered); });
    }
}
