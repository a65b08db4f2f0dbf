// Words of consecutive Philox blocks, as many blocks at a time as the instruction set holds. Included by kernels that
// multiversion.h compiles, inside its namespaces: no include guard, no headers.

#ifdef EFFTUNE_LANES
#if EFFTUNE_LANES == 8
#define EFFTUNE_MUL32(a, b) (Lanes) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
typedef uint64_t Lanes __attribute__((vector_size(64)));
#else
#define EFFTUNE_MUL32(a, b) (Lanes) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
typedef uint64_t Lanes __attribute__((vector_size(32)));
#endif

// The state lives in the low halves of 64-bit lanes; the high halves hold what the products leave there, which the
// next product ignores. GCC turns the same thing in plain C++ into full 64-bit products, twice as slow.
static inline void philox_rounds(Lanes c[4], uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    const Lanes m0 = Lanes{} + 0xD2511F53u, m1 = Lanes{} + 0xCD9E8D57u;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Lanes p0 = EFFTUNE_MUL32(c[0], m0), p1 = EFFTUNE_MUL32(c[2], m1);
        c[0] = (p1 >> 32) ^ c[1] ^ (Lanes{} + k0);
        c[2] = (p0 >> 32) ^ c[3] ^ (Lanes{} + k1);
        c[1] = p1;
        c[3] = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// Writes word k of block `block + j` to words[k][j]; count is a multiple of 16.
template <int N>
static inline void fill_words(uint32_t (&words)[4][N], int count, uint64_t seed, uint64_t block, uint32_t stream,
                              uint32_t purpose) {
    Lanes two_i;
    for (int i = 0; i < EFFTUNE_LANES; ++i) two_i[i] = 2 * i;
    for (int j = 0; j < count; j += 2 * EFFTUNE_LANES) {
        const Lanes blocks = two_i + (block + j);
        Lanes even[4] = {blocks, blocks >> 32, Lanes{} + stream, Lanes{} + purpose};
        const Lanes next = blocks + 1;
        Lanes odd[4] = {next, next >> 32, Lanes{} + stream, Lanes{} + purpose};
        philox_rounds(even, seed);
        philox_rounds(odd, seed);
        for (int k = 0; k < 4; ++k) {
            const Lanes both = (even[k] & 0xFFFFFFFFu) | (odd[k] << 32);  // little endian: back in the order of blocks
            memcpy(&words[k][j], &both, sizeof both);
        }
    }
}
#undef EFFTUNE_MUL32
#else
template <int N>
static inline void fill_words(uint32_t (&words)[4][N], int count, uint64_t seed, uint64_t block, uint32_t stream,
                              uint32_t purpose) {
    for (int j = 0; j < count; ++j) {
        const Words w = philox(seed, block + j, stream, purpose);
        words[0][j] = w.w0, words[1][j] = w.w1, words[2][j] = w.w2, words[3][j] = w.w3;
    }
}
#endif
