// Stands in for the compiler's header of this name where csrc/bf16_product.cpp is compiled for any processor: tiles and
// bfloat16 dot products as Intel's manual (vol. 2, TILELOADD, TDPBF16PS, VDPBF16PS) describes them. What would fault or
// be undefined there ends the program here.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

inline void need(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "bf16_on_cpu: %s\n", what);
    std::_Exit(3);
}

inline float bf16(uint16_t x) {  // a subnormal number counts as 0
    const uint32_t bits = (x & 0x7F80u) == 0 ? 0 : static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// ---- AMX ----

struct Tile {
    int rows, bytes;  // as configured, 0 if not
    union {
        uint8_t raw[16][64];
        uint16_t pair[16][32];
        float sum[16][16];
    };
};

inline thread_local Tile tiles[8];

inline Tile& tile(int i) {
    need(0 <= i && i < 8 && tiles[i].rows, "a tile that is not configured");
    return tiles[i];
}

inline void _tile_release() { std::memset(tiles, 0, sizeof tiles); }

inline void _tile_loadconfig(const void* memory) {
    uint8_t c[64];
    std::memcpy(c, memory, sizeof c);
    need(c[0] == 1, "palette 1 alone has tiles");
    for (int i = 1; i < 16; ++i) need(c[i] == 0, "start_row and reserved bytes are 0");
    _tile_release();
    for (int i = 0; i < 16; ++i) {
        const int bytes = c[16 + 2 * i] | c[17 + 2 * i] << 8, rows = c[48 + i];
        need(bytes <= 64 && rows <= 16 && !bytes == !rows && (i < 8 || !rows), "rows or bytes of a tile's row");
        if (i < 8) tiles[i].rows = rows, tiles[i].bytes = bytes;
    }
}

inline void _tile_loadd(int to, const void* memory, int64_t stride) {
    Tile& t = tile(to);
    std::memset(t.raw, 0, sizeof t.raw);
    for (int r = 0; r < t.rows; ++r) std::memcpy(t.raw[r], static_cast<const char*>(memory) + r * stride, t.bytes);
}

inline void _tile_stored(int from, void* memory, int64_t stride) {
    const Tile& t = tile(from);
    for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<char*>(memory) + r * stride, t.raw[r], t.bytes);
}

inline void _tile_dpbf16ps(int to, int first, int second) {
    Tile &c = tile(to), &a = tile(first), &b = tile(second);
    need(to != first && to != second && first != second, "three tiles, each another");
    need(c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows, "shapes of a product of tiles");
    for (int m = 0; m < c.rows; ++m) {
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < b.rows; ++k) {
            for (int n = 0; n < c.bytes / 4; ++n) {
                even[n] += bf16(a.pair[m][2 * k]) * bf16(b.pair[k][2 * n]);
                odd[n] += bf16(a.pair[m][2 * k + 1]) * bf16(b.pair[k][2 * n + 1]);
            }
        }
        for (int n = 0; n < c.bytes / 4; ++n) c.sum[m][n] += even[n] + odd[n];
    }
}

// ---- AVX-512 ----

typedef float __m512 __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef short __m512bh __attribute__((vector_size(64)));

inline const void* aligned(const void* memory) {
    need(reinterpret_cast<uintptr_t>(memory) % 64 == 0, "an aligned load or store elsewhere");
    return memory;
}

inline __m512 _mm512_load_ps(const void* memory) { return *static_cast<const __m512*>(aligned(memory)); }
inline __m512i _mm512_load_si512(const void* memory) { return *static_cast<const __m512i*>(aligned(memory)); }
inline void _mm512_store_ps(void* memory, __m512 x) { std::memcpy(memory, &x, sizeof x), aligned(memory); }

inline __m512i _mm512_set1_epi32(int x) {
    const long long both = static_cast<long long>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * 0x100000001u);
    return __m512i{both, both, both, both, both, both, both, both};
}

inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    for (int i = 0; i < 16; ++i) {
        sum[i] += bf16(static_cast<uint16_t>(a[2 * i + 1])) * bf16(static_cast<uint16_t>(b[2 * i + 1]));
        sum[i] += bf16(static_cast<uint16_t>(a[2 * i])) * bf16(static_cast<uint16_t>(b[2 * i]));
    }
    return sum;
}
