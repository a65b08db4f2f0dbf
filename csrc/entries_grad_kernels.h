// Blocks of tokens transposed, and products of their rows. Compiled once per instruction set by multiversion.h, hence
// no include guard and no headers.
//
// A block has a row of words for each column of g, then of z. A word is one token in float32, or two in bfloat16.

#include "word_rows.h"

typedef uint32_t FourWords __attribute__((vector_size(16)));
typedef float FourFloats __attribute__((vector_size(16)));

// Word w of `cols` columns; what is beyond them, or beyond the tokens, is 0.
template <class T>
static inline WordRow words_at(const typename T::Storage* x, int64_t stride, int64_t tokens, int64_t w, int64_t cols) {
    WordRow words = {};
#pragma GCC unroll 2
    for (int t = 0; t < kTokens<T>; ++t) {
        if (w * kTokens<T> + t >= tokens) break;
        words |= widened(x + (w * kTokens<T> + t) * stride, cols, T{}) << (16 * t);
    }
    return words;
}

template <class T>
static inline void transpose(const typename T::Storage* x, int64_t stride, int64_t tokens, int64_t from, int64_t to,
                             uint32_t* block, int64_t pitch) {
    for (int64_t w = 0; w < words_of<T>(tokens); w += kWidth) {
        for (int64_t c = from; c < to; c += kWidth) {
            const int64_t cols = to - c < kWidth ? to - c : kWidth;
            WordRow tile[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) tile[i] = words_at<T>(x + c, stride, tokens, w + i, cols);
            transpose_tile<WordRow, kWidth>(tile);
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i)
                if (i < cols) memcpy(block + (c + i) * pitch + w, &tile[i], sizeof tile[i]);
        }
    }
}

static inline void multiply(FloatRow& sum, WordRow a, WordRow b, BFloat16) {
    sum += (FloatRow)(a << 16) * (FloatRow)(b << 16);
    sum += (FloatRow)(a & 0xFFFF0000u) * (FloatRow)(b & 0xFFFF0000u);
}
template <class T>
static inline void multiply(FloatRow& sum, WordRow a, WordRow b, T) {
    sum += (FloatRow)a * (FloatRow)b;
}

// Σ g z for each of four rows z, in kSums sums whatever the width of registers. Four, since one needs as many loads of
// g as of z, and waits for its sums.
template <class T>
static inline FourFloats dots(const uint32_t* g, const uint32_t* const* z, int64_t words) {
    FloatRow s[4][kSums / kWidth] = {};
    const uint32_t *z0 = z[0], *z1 = z[1], *z2 = z[2], *z3 = z[3];
    for (int64_t w = 0; w < words; w += kSums) {
#pragma GCC unroll 4
        for (int v = 0; v < kSums / kWidth; ++v) {
            const int64_t at = w + v * kWidth;
            const auto a = loaded<WordRow>(g + at);
            multiply(s[0][v], a, loaded<WordRow>(z0 + at), T{});
            multiply(s[1][v], a, loaded<WordRow>(z1 + at), T{});
            multiply(s[2][v], a, loaded<WordRow>(z2 + at), T{});
            multiply(s[3][v], a, loaded<WordRow>(z3 + at), T{});
        }
    }
    FourFloats r[4];
    for (int j = 0; j < 4; ++j) {
        FourFloats q[4];
        static_assert(sizeof q == sizeof s[j]);
        memcpy(q, s[j], sizeof q);
        r[j] = (q[0] + q[2]) + (q[1] + q[3]);
    }
    transpose_tile<FourWords, 4>(r);
    return (r[0] + r[2]) + (r[1] + r[3]);
}

__attribute__((noinline)) static void entries_transpose(const EntriesArgs& a, int64_t first, int64_t tokens, bool of_z,
                                                        int64_t from, int64_t to) {
    visit(a.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t stride = of_z ? a.z_stride : a.g_stride;
        const auto* x = static_cast<const typename T::Storage*>(of_z ? a.z : a.g) + first * stride;
        transpose<T>(x, stride, tokens, from, to, a.block + (of_z ? a.n * a.pitch : 0), a.pitch);
    });
}

// Entries from..to: their part of the block is added to what blocks before it gave.
__attribute__((noinline)) static void entries_dots(const EntriesArgs& a, int64_t first, int64_t tokens, int64_t from,
                                                   int64_t to) {
    visit(a.dtype, [&](auto type) {
        using T = decltype(type);
        const uint32_t *g = a.block, *z = a.block + a.n * a.pitch;
        const auto k = static_cast<uint32_t>(a.k);
        for (int64_t s = from; s < to;) {
            const uint32_t index = static_cast<uint32_t>(a.indices[s]), row = index / k, start = row * k;
            int count = 1;
            while (count < 4 && s + count < to && static_cast<uint32_t>(a.indices[s + count]) - start < k) ++count;
            const uint32_t* cols[4];
            for (int j = 0; j < 4; ++j)
                cols[j] = z + (static_cast<uint32_t>(a.indices[j < count ? s + j : s]) - start) * a.pitch;
            const FourFloats made = dots<T>(g + row * a.pitch, cols, words_of<T>(tokens));
            for (int j = 0; j < count; ++j) a.out[s + j] = first == 0 ? made[j] : a.out[s + j] + made[j];
            s += count;
        }
    });
}
