// The blocks of bf16_product, over Unit, which multiplies two pairs of tiles: included by bf16_product.cpp once per
// unit, inside its namespace, hence no include guard and no headers.
//
// Both operands are packed in tiles of 16 words by 16, 1 KB; a word is two neighbours along K. Those of b are rows as
// they stand, those of a are transposed, as tdpbf16ps takes its second operand and as a vector of vdpbf16ps holds 16
// rows of a. So it is a that is packed once for all, and b, the long one (a vocabulary), whose rows are only copied.

typedef uint32_t WordRow __attribute__((vector_size(64)));  // a row of a tile
typedef float FloatRow __attribute__((vector_size(64)));

#include "transpose_tile.h"

// 16 rows by 16 words of the matrix of `rows` rows from `from` on, columns k.. of cols; beyond it are zeros.
static inline void load_tile(WordRow* tile, const uint16_t* x, int64_t from, int64_t rows, int64_t stride, int64_t k,
                             int64_t cols) {
    for (int64_t r = 0; r < kSide; ++r) {
        tile[r] = WordRow{};
        if (from + r >= rows || k >= cols) continue;
        const uint16_t* at = x + (from + r) * stride + k;
        if (cols - k >= 2 * kSide) {
            memcpy(&tile[r], at, sizeof tile[r]);
        } else {
            memcpy(&tile[r], at, static_cast<size_t>(cols - k) * sizeof *at);
        }
    }
}

// Rows pair * 32.. of a, transposed, at packed + pair * (all tiles of a pair).
__attribute__((noinline)) static void pack_a(const ProductArgs& p, int64_t pair, uint32_t* packed) {
    WordRow tile[kSide];
    const int64_t steps = ceil_div(p.k, 2 * kSide);
    for (int64_t s = 0; s < steps; ++s) {
        for (int half = 0; half < 2; ++half) {
            load_tile(tile, p.a, (2 * pair + half) * kSide, p.m, p.a_stride, s * 2 * kSide, p.k);
            transpose_tile<WordRow, kSide>(tile);
            memcpy(packed + ((pair * steps + s) * 2 + half) * kTileWords, tile, sizeof tile);
        }
    }
}

// out (rows m0.. and up to kPairs pairs of tiles, 32 columns from n0 on) = a bᵀ. A block of kSteps tiles along K at a
// time: 16 KB of b and as much of a stay in the first-level cache, and the sums of all rows in the second.
__attribute__((noinline)) static void product_block(const ProductArgs& p, const uint32_t* packed, int64_t pair0,
                                                    int64_t n0) {
    alignas(64) float sums[kPairs][4][kTileWords];
    alignas(64) uint32_t b[kSteps][2][kTileWords];
    const int64_t steps = ceil_div(p.k, 2 * kSide);
    const int64_t left = ceil_div(p.m, 2 * kSide) - pair0, pairs = left < kPairs ? left : kPairs;
    memset(sums, 0, static_cast<size_t>(pairs) * sizeof sums[0]);
    const Unit unit;
    for (int64_t s0 = 0; s0 < steps; s0 += kSteps) {
        const int64_t here = steps - s0 < kSteps ? steps - s0 : kSteps;
        for (int64_t s = 0; s < here; ++s) {
            for (int half = 0; half < 2; ++half) {
                WordRow tile[kSide];
                load_tile(tile, p.b, n0 + half * kSide, p.n, p.b_stride, (s0 + s) * 2 * kSide, p.k);
                memcpy(b[s][half], tile, sizeof tile);
            }
        }
        // The next block of each row comes from memory while this one is multiplied.
        for (int64_t r = n0; r < p.n && r < n0 + 2 * kSide && s0 + here < steps; ++r) {
            for (int64_t s = 0; s < kSteps; ++s) {
                __builtin_prefetch(p.b + r * p.b_stride + (s0 + kSteps + s) * 2 * kSide);
            }
        }
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const uint32_t* a = packed + ((pair0 + pair) * steps + s0) * 2 * kTileWords;
            alignas(64) float part[4][kTileWords] = {};  // one long sum over K would err more
            unit.multiply(part, b[0][0], a, here);
            for (int64_t tile = 0; tile < 4; ++tile) {
                for (int64_t i = 0; i < kTileWords; ++i) sums[pair][tile][i] += part[tile][i];
            }
        }
    }
    for (int64_t tile = 0; tile < 4 * pairs; ++tile) {
        const int64_t m = (pair0 * 2 + tile / 4 * 2 + tile % 2) * kSide, n = n0 + tile % 4 / 2 * kSide;
        FloatRow r[kSide];
        memcpy(r, sums[tile / 4][tile % 4], sizeof r);
        transpose_tile<WordRow, kSide>(r);
        for (int64_t i = 0; i < kSide && m + i < p.m && n < p.n; ++i) {
            const int64_t count = p.n - n < kSide ? p.n - n : kSide;
            float* at = p.out + (m + i) * p.out_stride + n;
            if (count == kSide) {
                memcpy(at, &r[i], sizeof r[i]);
            } else {
                memcpy(at, &r[i], static_cast<size_t>(count) * sizeof *at);
            }
        }
    }
}
