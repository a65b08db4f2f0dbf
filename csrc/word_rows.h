// Columns of a row of numbers as a register of words. Included by kernels, inside their namespaces, so that it is
// compiled for their instruction set: no include guard, no headers.

#ifdef EFFTUNE_LANES
constexpr int kWidth = 2 * EFFTUNE_LANES;  // words in a register
#else
constexpr int kWidth = 4;
#endif
typedef uint16_t HalfRow __attribute__((vector_size(2 * kWidth)));
typedef uint32_t WordRow __attribute__((vector_size(4 * kWidth)));
typedef float FloatRow __attribute__((vector_size(4 * kWidth)));

#include "transpose_tile.h"

template <class Row>
static inline Row loaded(const void* at) {
    Row row;
    memcpy(&row, at, sizeof row);
    return row;
}

// kWidth numbers as words, bfloat16 in their lower halves, float16 as float32.
static inline WordRow widened(const float* x, Float32) { return loaded<WordRow>(x); }
static inline WordRow widened(const uint16_t* x, BFloat16) {
    return __builtin_convertvector(loaded<HalfRow>(x), WordRow);
}
static inline WordRow widened(const uint16_t* x, Float16) {
    float values[kWidth];
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) values[i] = Float16::load(x[i]);
    return loaded<WordRow>(values);
}

// The same of `count` numbers; what is beyond them is 0.
template <class T>
static inline WordRow widened(const typename T::Storage* x, int64_t count, T type) {
    if (count >= kWidth) return widened(x, type);
    typename T::Storage values[kWidth] = {};
    memcpy(values, x, static_cast<size_t>(count) * sizeof *x);
    return widened(values, type);
}
