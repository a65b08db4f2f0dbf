// Rows of g scaled and gathered. Compiled once per instruction set by multiversion.h, hence no include guard and no
// headers.

template <class T>
static inline void scale_tile_of(const ScaleRowsArgs& a, int64_t from, int64_t to) {
    const auto* g = static_cast<const typename T::Storage*>(a.g);
    auto* out = static_cast<typename T::Storage*>(a.out);
    if (a.transposed) {  // a tile of rows stays in the cache while it is written column by column
        for (int64_t n = 0; n < a.cols; ++n)
            for (int64_t s = from; s < to; ++s)
                out[n * a.kept + s] = T::store(T::load(g[a.idx[s] * a.stride + n]) * a.weight[s]);
        return;
    }
    for (int64_t s = from; s < to; ++s) {
        const auto* row = g + a.idx[s] * a.stride;
        const float weight = a.weight[s];
#pragma omp simd
        for (int64_t n = 0; n < a.cols; ++n) out[s * a.cols + n] = T::store(T::load(row[n]) * weight);
    }
}

__attribute__((noinline)) static void scale_tile(const ScaleRowsArgs& a, int64_t from, int64_t to) {
    visit(a.dtype, [&](auto type) { scale_tile_of<decltype(type)>(a, from, to); });
}
