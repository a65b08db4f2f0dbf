// Products with a sparse matrix for a few tokens at a time. Compiled once per instruction set by multiversion.h, hence
// no include guard and no headers.

#include "word_rows.h"

constexpr int kRegisters = kTokens / kWidth;  // of a column of all tokens

// Columns of `tokens` rows of x, as rows of the block.
template <class T>
static inline void read_tokens(const typename T::Storage* x, int64_t stride, int64_t tokens, int64_t cols,
                               float* block) {
    constexpr int kShift = std::is_same_v<T, BFloat16> ? 16 : 0;
    for (int64_t c = 0; c < cols; c += kWidth) {
        const int64_t count = cols - c < kWidth ? cols - c : kWidth;
#pragma GCC unroll 4
        for (int64_t t = 0; t < kTokens; t += kWidth) {
            WordRow tile[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i)
                tile[i] = t + i < tokens ? widened(x + (t + i) * stride + c, count, T{}) << kShift : WordRow{};
            transpose_tile<WordRow, kWidth>(tile);
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i)
                if (i < count) memcpy(block + (c + i) * kTokens + t, &tile[i], sizeof tile[i]);
        }
    }
}

// y += block, rounded once. The block has room for whole registers of columns.
template <class T>
static inline void add_tokens(typename T::Storage* y, int64_t stride, int64_t tokens, int64_t cols,
                              const float* block) {
    for (int64_t c = 0; c < cols; c += kWidth) {
        const int64_t count = cols - c < kWidth ? cols - c : kWidth;
        for (int64_t t = 0; t < tokens; t += kWidth) {
            WordRow tile[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) tile[i] = loaded<WordRow>(block + (c + i) * kTokens + t);
            transpose_tile<WordRow, kWidth>(tile);
            for (int i = 0; i < kWidth && t + i < tokens; ++i) {
                float added[kWidth];
                memcpy(added, &tile[i], sizeof added);
                auto* row = y + (t + i) * stride + c;
#pragma omp simd
                for (int j = 0; j < count; ++j) row[j] = T::store(T::load(row[j]) + added[j]);
            }
        }
    }
}

// Sums in the order of the entries.
template <bool kTransposed>
static inline void multiply_entries(const EntriesLinearArgs& a, const float* from, float* to) {
    const auto k = static_cast<uint32_t>(a.k);
    for (int64_t s = 0; s < a.count;) {
        const uint32_t row = static_cast<uint32_t>(a.indices[s]) / k, start = row * k;
        FloatRow of_row[kRegisters] = {};
#pragma GCC unroll 4
        for (int r = 0; r < kRegisters && kTransposed; ++r)
            of_row[r] = loaded<FloatRow>(from + row * kTokens + r * kWidth);
        for (; s < a.count; ++s) {
            const uint32_t col = static_cast<uint32_t>(a.indices[s]) - start;
            if (col >= k) break;
            const float value = a.values[s];
            if constexpr (kTransposed) {
                float* const at = to + col * kTokens;
#pragma GCC unroll 4
                for (int r = 0; r < kRegisters; ++r) {
                    const FloatRow sum = loaded<FloatRow>(at + r * kWidth) + of_row[r] * value;
                    memcpy(at + r * kWidth, &sum, sizeof sum);
                }
            } else {
                const float* const at = from + col * kTokens;
#pragma GCC unroll 4
                for (int r = 0; r < kRegisters; ++r) of_row[r] += loaded<FloatRow>(at + r * kWidth) * value;
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRegisters && !kTransposed; ++r)
            memcpy(to + row * kTokens + r * kWidth, &of_row[r], sizeof of_row[r]);
    }
}

__attribute__((noinline)) static void entries_linear_tokens(const EntriesLinearArgs& a, int64_t first, float* block) {
    const int64_t tokens = a.m - first < kTokens ? a.m - first : kTokens, from = a.from(), to = a.to();
    float* const sums = block + from * kTokens;
    memset(sums, 0, static_cast<size_t>(to + kSpare) * kTokens * sizeof *sums);
    visit(a.dtype, [&](auto type) {
        using T = decltype(type);
        read_tokens<T>(static_cast<const typename T::Storage*>(a.x) + first * a.x_stride, a.x_stride, tokens, from,
                       block);
        if (a.transposed)
            multiply_entries<true>(a, block, sums);
        else
            multiply_entries<false>(a, block, sums);
        add_tokens<T>(static_cast<typename T::Storage*>(a.y) + first * a.y_stride, a.y_stride, tokens, to, sums);
    });
}
