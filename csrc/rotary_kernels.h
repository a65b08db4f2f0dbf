// Rotary position embedding of one token, all its heads. Compiled once per instruction set by multiversion.h, hence no
// include guard and no headers. cos and sin of a token are widened once, in pieces, and serve all heads of
// both tensors.

constexpr int kRotaryPiece = 256, kRotaryLanes = 32;

// Of the pairs (i, D/2 + i): y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2.
struct RotaryTable {
    alignas(64) float c1[kRotaryPiece], c2[kRotaryPiece], s1[kRotaryPiece], s2[kRotaryPiece];
};

template <class C>
static inline void rotary_table(const RotaryArgs& r, int64_t sample, int64_t token, int64_t from, int count,
                                RotaryTable& table) {
    using Storage = typename C::Storage;
    const int64_t half = r.size / 2;
    const auto* cos = static_cast<const Storage*>(r.cos) + sample * r.cos_stride[0] + token * r.cos_stride[1] + from;
    const auto* sin = static_cast<const Storage*>(r.sin) + sample * r.sin_stride[0] + token * r.sin_stride[1] + from;
#pragma omp simd
    for (int i = 0; i < count; ++i) table.c1[i] = C::load(cos[i]), table.c2[i] = C::load(cos[half + i]);
    if (r.transposed) {
#pragma omp simd
        for (int i = 0; i < count; ++i) table.s1[i] = -C::load(sin[half + i]), table.s2[i] = -C::load(sin[i]);
    } else {
#pragma omp simd
        for (int i = 0; i < count; ++i) table.s1[i] = C::load(sin[i]), table.s2[i] = C::load(sin[half + i]);
    }
}

template <class T>
static EFFTUNE_INLINE void rotary_block(const RotaryTable& table, const typename T::Storage* x, typename T::Storage* y,
                                        int64_t half, int at, int count) {
#pragma omp simd
    for (int i = at; i < at + count; ++i) {
        const float x1 = T::load(x[i]), x2 = T::load(x[half + i]);
        y[i] = T::store(x1 * table.c1[i] - x2 * table.s1[i]);
        y[half + i] = T::store(x2 * table.c2[i] + x1 * table.s2[i]);
    }
}

template <class T>
static inline void rotary_heads(const RotaryArgs& r, int64_t sample, int64_t token, int64_t from, int count,
                                const RotaryTable& table) {
    using Storage = typename T::Storage;
    const int64_t half = r.size / 2;
    for (const RotaryHeads& t : r.tensors) {
        const auto* x = static_cast<const Storage*>(t.x) + sample * t.x_stride[0] + token * t.x_stride[2] + from;
        auto* y = static_cast<Storage*>(t.out) + sample * t.out_stride[0] + token * t.out_stride[2] + from;
        for (int64_t head = 0; head < t.heads; ++head, x += t.x_stride[1], y += t.out_stride[1]) {
            int i = 0;  // blocks of a constant length, or GCC peels and masks each of these short loops
            for (; i + kRotaryLanes <= count; i += kRotaryLanes) rotary_block<T>(table, x, y, half, i, kRotaryLanes);
            if (i < count) rotary_block<T>(table, x, y, half, i, count - i);
        }
    }
}

__attribute__((noinline)) static void rotary_token(const RotaryArgs& r, int64_t sample, int64_t token) {
    RotaryTable table;
    for (int64_t from = 0; from < r.size / 2; from += kRotaryPiece) {
        const int64_t left = r.size / 2 - from;
        const int count = static_cast<int>(left < kRotaryPiece ? left : kRotaryPiece);
        visit(r.table_dtype, [&](auto type) { rotary_table<decltype(type)>(r, sample, token, from, count, table); });
        visit(r.dtype, [&](auto type) { rotary_heads<decltype(type)>(r, sample, token, from, count, table); });
    }
}
