// One row of codes · scale. Compiled once per instruction set by multiversion.h, hence no include guard and no headers.

template <class S, class T>
static inline void dequantize_row(const Int8Args& q, int64_t row) {
    const int64_t groups = (q.cols + q.group - 1) / q.group;
    const int8_t* codes = q.codes + row * q.cols;
    const auto* scales = static_cast<const typename S::Storage*>(q.scales) + row * groups;
    auto* out = static_cast<typename T::Storage*>(q.out) + row * q.cols;
    for (int64_t g = 0; g < groups; ++g) {
        const float scale = S::load(scales[g]);
        const int64_t end = (g + 1) * q.group < q.cols ? (g + 1) * q.group : q.cols;
#pragma omp simd
        for (int64_t k = g * q.group; k < end; ++k) out[k] = T::store(static_cast<float>(codes[k]) * scale);
    }
}

__attribute__((noinline)) static void int8_row(const Int8Args& q, int64_t row) {
    visit(q.scale_dtype, [&](auto scale) {
        visit(q.dtype, [&](auto type) { dequantize_row<decltype(scale), decltype(type)>(q, row); });
    });
}
