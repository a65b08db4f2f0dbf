// One row of a tile of logits: its cross-entropy, and the logits replaced by the gradient. Compiled once per
// instruction set by multiversion.h, hence no include guard and no headers.

constexpr int64_t kSpan = 1024;  // elements at a time: they stay in the first-level cache

// Cephes' expf, within 1 ulp; below 2^-125 it is 0. The library's function would keep loops scalar.
static inline float exponential(float x) {
    const float clamped = x < -86.64339f ? -86.64339f : x > 88.72283f ? 88.72283f : x;
    const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    const float n = shifted - 12582912.0f;
    const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^(n - 1) twice: n reaches 128, whose power is no float.
    const float half = as_float((as_bits(shifted) - 0x4B400000u + 126u) << 23);
    return x < -86.64339f ? 0.0f : p * half * 2.0f;
}

static inline float hyperbolic_tangent(float x) {
    const float sq = x * x;
    float p = sq * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * sq - 5.37397155531e-2f;
    p = p * sq + 1.33314422036e-1f;
    p = p * sq - 3.33332819422e-1f;
    const float magnitude = x < 0.0f ? -x : x;  // of a negative x the difference below would cancel
    const float small = p * sq * x + x, large = 1.0f - 2.0f / (exponential(2.0f * magnitude) + 1.0f);
    return magnitude < 0.625f ? small : x < 0.0f ? -large : large;
}

// u = tanh((z + bias) / softcap), or z + bias without a cap, of logits at..at + count. The slope 1 - u² is taken from u
// itself: from a rounded softcap u it would lose precision where the cap saturates.
static inline void load_logits(const LinearCrossEntropyArgs& c, const float* z, int64_t at, int64_t count, float* u) {
    if (c.bias) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) u[j] = z[at + j] + c.bias[at + j];
    } else {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) u[j] = z[at + j];
    }
    if (c.softcap != 0.0f) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) u[j] = hyperbolic_tangent(u[j] / c.softcap);
    }
}

// Σ f(j) for j < count, in lanes that are added in a fixed order: that of a reduction clause would depend on the
// instruction set, and the last bits of the sum with it.
template <class F>
static EFFTUNE_INLINE float sum_of(int64_t count, F f) {
    constexpr int kLanes = 64;
    alignas(64) float lanes[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
#pragma omp simd
        for (int j = 0; j < kLanes; ++j) lanes[j] += f(k + j);
    }
#pragma omp simd
    for (int64_t j = k; j < count; ++j) lanes[j - k] += f(j);
    for (int half = kLanes / 2; half; half /= 2)
        for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
}

static inline void row_loss(const LinearCrossEntropyArgs& c, const float* z, int64_t row) {
    alignas(64) float y[kSpan];
    const float scale = c.softcap != 0.0f ? c.softcap : 1.0f;
    float most = -INFINITY;
    double sum = 0.0, total = 0.0;  // of exp(y - most) and of y
    for (int64_t at = 0; at < c.cols; at += kSpan) {
        const int64_t count = c.cols - at < kSpan ? c.cols - at : kSpan;
        load_logits(c, z, at, count, y);
        float most_here = -INFINITY;
#pragma omp simd reduction(max : most_here)
        for (int64_t j = 0; j < count; ++j) {
            y[j] *= scale;
            most_here = y[j] > most_here ? y[j] : most_here;
        }
        if (most_here > most) {
            sum *= std::exp(static_cast<double>(most) - most_here);
            most = most_here;
        }
        sum += sum_of(count, [&](int64_t j) __attribute__((always_inline)) { return exponential(y[j] - most); });
        if (c.smoothing == 0.0f) continue;
        total += sum_of(count, [&](int64_t j) __attribute__((always_inline)) { return y[j]; });
    }
    load_logits(c, z, c.targets[row], 1, y);
    const double eps = c.smoothing, log_sum = std::log(sum), at_target = y[0] * scale;
    const double uniform = eps == 0.0 ? 0.0 : eps * (total / static_cast<double>(c.cols));
    c.norm[row] = most;
    c.norm[c.rows + row] = static_cast<float>(1.0 / sum);
    c.loss[row] = static_cast<float>(most + log_sum - (1.0 - eps) * at_target - uniform);
}

static inline void row_gradient(const LinearCrossEntropyArgs& c, float* z, int64_t row) {
    alignas(64) float u[kSpan];
    const float scale = c.softcap != 0.0f ? c.softcap : 1.0f, capped = c.softcap != 0.0f ? 1.0f : 0.0f;
    const float most = c.norm[row], factor = c.norm[c.rows + row], dy = c.dy ? c.dy[row] : 1.0f;
    const float uniform = c.smoothing / static_cast<float>(c.vocabulary);
    const int64_t target = c.targets[row] - c.first;
    const bool here = target >= 0 && target < c.cols;
    float at_target = 0.0f;
    if (here) {
        load_logits(c, z, target, 1, u);
        const float p = exponential(scale * u[0] - most) * factor;
        at_target = (p - uniform - (1.0f - c.smoothing)) * (1.0f - capped * u[0] * u[0]) * dy;
    }
    for (int64_t at = 0; at < c.cols; at += kSpan) {
        const int64_t count = c.cols - at < kSpan ? c.cols - at : kSpan;
        load_logits(c, z, at, count, u);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
            const float p = exponential(scale * u[j] - most) * factor;
            z[at + j] = (p - uniform) * (1.0f - capped * u[j] * u[j]) * dy;
        }
    }
    if (here) z[target] = at_target;
}

__attribute__((noinline)) static void linear_cross_entropy_row(const LinearCrossEntropyArgs& c, int64_t row) {
    float* z = c.z + row * c.cols;
    if (c.targets[row] == c.ignore_index) {
        if (c.loss) c.loss[row] = c.norm[row] = c.norm[c.rows + row] = 0.0f;
        if (c.gradient) memset(z, 0, static_cast<size_t>(c.cols) * sizeof *z);
        return;
    }
    if (c.loss) row_loss(c, z, row);
    if (c.gradient) row_gradient(c, z, row);
}
