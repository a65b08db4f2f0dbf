// Rows of RMSNorm and LayerNorm, and chunks of rows of their gradients. Compiled once per instruction set by
// multiversion.h, hence no include guard and no headers.
//
// Sums run in kNormLanes lanes that are added in a fixed order at the end: no reduction clause, whose order depends on
// the width of the vectors. A block of lanes has a constant length where it is whole, or GCC peels and masks each one.

constexpr int kNormLanes = 64;

template <class F>
static EFFTUNE_INLINE void in_blocks(int64_t cols, F f) {
    int64_t k = 0;
    for (; k + kNormLanes <= cols; k += kNormLanes) f(k, kNormLanes);
    if (k < cols) f(k, static_cast<int>(cols - k));
}

static inline float lane_total(float* lanes) {
    for (int half = kNormLanes / 2; half; half /= 2)
        for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
}

template <class T>
static inline void norm_write(const NormArgs& n, int64_t row) {
    const auto* x = static_cast<const typename T::Storage*>(n.x) + row * n.cols;
    auto* y = static_cast<typename T::Storage*>(n.y) + row * n.cols;
    const float mean = n.mean ? n.mean[row] : 0.0f, rstd = n.rstd[row];
    if (n.bias) {
#pragma omp simd
        for (int64_t k = 0; k < n.cols; ++k) y[k] = T::store((T::load(x[k]) - mean) * rstd * n.gain[k] + n.bias[k]);
    } else {
#pragma omp simd
        for (int64_t k = 0; k < n.cols; ++k) y[k] = T::store((T::load(x[k]) - mean) * rstd * n.gain[k]);
    }
}

template <class T>
static inline void norm_statistics(const NormArgs& n, int64_t row) {
    const auto* x = static_cast<const typename T::Storage*>(n.x) + row * n.cols;
    float mean = 0.0f;
    if (n.mean) {
        alignas(64) float lanes[kNormLanes] = {};
        in_blocks(n.cols, [&](int64_t k, int count) __attribute__((always_inline)) {
#pragma omp simd
            for (int j = 0; j < count; ++j) lanes[j] += T::load(x[k + j]);
        });
        n.mean[row] = mean = lane_total(lanes) / static_cast<float>(n.cols);
    }
    alignas(64) float lanes[kNormLanes] = {};
    in_blocks(n.cols, [&](int64_t k, int count) __attribute__((always_inline)) {
#pragma omp simd
        for (int j = 0; j < count; ++j) {
            const float d = T::load(x[k + j]) - mean;
            lanes[j] += d * d;
        }
    });
    n.rstd[row] = 1.0f / sqrtf(lane_total(lanes) / static_cast<float>(n.cols) + n.eps);
}

template <class T>
static inline void norm_row_as(const NormArgs& n, int64_t row, bool saved) {
    if (!saved) norm_statistics<T>(n, row);
    norm_write<T>(n, row);
}

// saved: mean and rstd are read, not computed.
__attribute__((noinline)) static void norm_row(const NormArgs& n, int64_t row, bool saved) {
    visit(n.dtype, [&](auto type) { norm_row_as<decltype(type)>(n, row, saved); });
}

template <class T>
static inline void norm_backward_row(const NormBackwardArgs& n, int64_t row, float* dweight, float* dbias) {
    const auto* x = static_cast<const typename T::Storage*>(n.x) + row * n.cols;
    const auto* dy = static_cast<const typename T::Storage*>(n.dy) + row * n.cols;
    auto* dx = static_cast<typename T::Storage*>(n.dx) + row * n.cols;
    const float mean = n.mean ? n.mean[row] : 0.0f, rstd = n.rstd[row];
    alignas(64) float sums[kNormLanes] = {}, products[kNormLanes] = {};
    in_blocks(n.cols, [&](int64_t k, int count) __attribute__((always_inline)) {
        alignas(64) float x_hat[kNormLanes], d[kNormLanes];
#pragma omp simd
        for (int j = 0; j < count; ++j) {
            x_hat[j] = (T::load(x[k + j]) - mean) * rstd;
            d[j] = T::load(dy[k + j]);
            const float g = d[j] * n.gain[k + j];
            sums[j] += g;
            products[j] += g * x_hat[j];
        }
        if (dweight) {
#pragma omp simd
            for (int j = 0; j < count; ++j) dweight[k + j] += d[j] * x_hat[j];
        }
        if (dbias) {
#pragma omp simd
            for (int j = 0; j < count; ++j) dbias[k + j] += d[j];
        }
    });
    const float a = n.mean ? lane_total(sums) / static_cast<float>(n.cols) : 0.0f;
    const float b = lane_total(products) / static_cast<float>(n.cols);
#pragma omp simd
    for (int64_t k = 0; k < n.cols; ++k) {
        const float x_hat = (T::load(x[k]) - mean) * rstd;
        dx[k] = T::store(rstd * (T::load(dy[k]) * n.gain[k] - a - x_hat * b));
    }
}

// Rows [from, to); dweight and dbias of them are added to one row of partial sums each, or to none.
__attribute__((noinline)) static void norm_backward_rows(const NormBackwardArgs& n, int64_t from, int64_t to,
                                                         float* dweight, float* dbias) {
    for (int64_t row = from; row < to; ++row) {
        visit(n.dtype, [&](auto type) { norm_backward_row<decltype(type)>(n, row, dweight, dbias); });
    }
}
