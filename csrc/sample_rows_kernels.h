// The norm of one row. Compiled once per instruction set by multiversion.h, hence no include guard and no headers.

template <class T>
static inline float norm_of(const typename T::Storage* x, int64_t count) {
    constexpr int kSums = 32;  // fixed: the order of the sum, and so its bits, must not depend on the instruction set
    alignas(64) float sums[kSums] = {};
    int64_t k = 0;
    for (; k + kSums <= count; k += kSums) {
#pragma omp simd
        for (int j = 0; j < kSums; ++j) {
            const float v = T::load(x[k + j]);
            sums[j] += v * v;
        }
    }
    for (int j = 0; k + j < count; ++j) {
        const float v = T::load(x[k + j]);
        sums[j] += v * v;
    }
    for (int half = kSums / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
    return sqrtf(sums[0]);
}

__attribute__((noinline)) static void row_norm(const RowNormsArgs& a, int64_t row) {
    visit(a.dtype, [&](auto type) {
        const auto* x = static_cast<const typename decltype(type)::Storage*>(a.x) + row * a.stride;
        a.out[row] = norm_of<decltype(type)>(x, a.cols);
    });
}
