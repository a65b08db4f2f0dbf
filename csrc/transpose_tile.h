// Transposes a tile of kSide rows of kSide lanes of 32 bits. Included by kernels, inside their namespaces, so that it
// is compiled for their instruction set: no include guard, no headers.

// Steps of exchange: of rows i and i + step, the second half of every 2 * step goes against the first. Lanes is a row
// of integers.
template <class Lanes, int kSide, class Row>
static inline void transpose_tile(Row* r) {
#pragma GCC unroll 4
    for (int step = 1; step < kSide; step *= 2) {
        Lanes low, high;
        for (int l = 0; l < kSide; ++l) {
            low[l] = l & step ? kSide + l - step : l;
            high[l] = l & step ? kSide + l : l + step;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) {
            if (i & step) continue;
            const Row a = r[i], b = r[i + step];
            r[i] = __builtin_shuffle(a, b, low);
            r[i + step] = __builtin_shuffle(a, b, high);
        }
    }
}
