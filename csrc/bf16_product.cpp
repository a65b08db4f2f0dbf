// bfloat16 products with float32 results, which torch's CPU operators do not give: they round to bfloat16 once more.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "register.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EFFTUNE_BF16_UNITS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace efftune {

struct ProductArgs {
    const uint16_t *a, *b;  // bfloat16 (m, k) and (n, k): rows are strides apart, their elements adjacent
    float* out;             // (m, n): a bᵀ
    int64_t m, n, k, a_stride, b_stride, out_stride;
};

// kNone: what the units do in plain C++, for tests.
enum class Bf16Unit : int { kNone = 0, kAvx512 = 1, kAmx = 2 };

constexpr const char* kUnitNames[] = {"none", "avx512", "amx"};  // in the order of Bf16Unit

constexpr int64_t kSide = 16, kTileWords = kSide * kSide;  // of a tile
constexpr int64_t kSteps = 8, kPairs = 8;                  // tiles along K, and pairs of tiles of a, in a block

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Each Unit has multiply(sums, b, a, steps): sums[2 i + j] += b's tile i times a's tile j, for `steps` pairs of tiles.

#ifdef EFFTUNE_BF16_UNITS
// 16 x 16 sums in a tile register: 16 cycles for 16 x 16 x 32 products, of two loads. Four tiles of sums need one load
// for each.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,amx-tile,amx-bf16,prefer-vector-width=512")
namespace amx {
struct Unit {
    Unit() {  // eight tiles of 16 rows of 64 bytes, in this thread
        alignas(64) uint8_t palette[64] = {1};
        for (int tile = 0; tile < 8; ++tile) palette[16 + 2 * tile] = 64, palette[48 + tile] = kSide;
        asm volatile("" : : "r"(palette) : "memory");  // GCC's intrinsics do not say that they read what they read
        _tile_loadconfig(palette);
    }
    ~Unit() { _tile_release(); }

    static inline void multiply(float (*sums)[kTileWords], const uint32_t* b, const uint32_t* a, int64_t steps) {
        asm volatile("" : : "r"(sums), "r"(b), "r"(a) : "memory");
        _tile_loadd(0, sums[0], 64);
        _tile_loadd(1, sums[1], 64);
        _tile_loadd(2, sums[2], 64);
        _tile_loadd(3, sums[3], 64);
        for (int64_t s = 0; s < steps; ++s, a += 2 * kTileWords, b += 2 * kTileWords) {
            _tile_loadd(4, b, 64);
            _tile_loadd(6, a, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, a + kTileWords, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, b + kTileWords, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
};
#include "bf16_product_kernels.h"
}  // namespace amx
#pragma GCC pop_options

// 8 rows of b times 32 of a in 16 registers: for each word of K two loads, and eight broadcasts for 16 products.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,prefer-vector-width=512")
namespace avx512 {
struct Unit {
    static inline void multiply(float (*sums)[kTileWords], const uint32_t* b, const uint32_t* a, int64_t steps) {
        for (int64_t n = 0; n < 2 * kSide; n += 8) {
            float* at[2] = {sums[n / kSide * 2] + n % kSide * kSide, sums[n / kSide * 2 + 1] + n % kSide * kSide};
            __m512 acc[8][2];
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r) {
                acc[r][0] = _mm512_load_ps(at[0] + r * kSide), acc[r][1] = _mm512_load_ps(at[1] + r * kSide);
            }
            for (int64_t s = 0; s < steps; ++s) {
                const uint32_t *a_tile = a + s * 2 * kTileWords, *b_row = b + s * 2 * kTileWords + n * kSide;
                for (int64_t w = 0; w < kSide; ++w) {
                    const auto a0 = reinterpret_cast<__m512bh>(_mm512_load_si512(a_tile + w * kSide));
                    const auto a1 = reinterpret_cast<__m512bh>(_mm512_load_si512(a_tile + kTileWords + w * kSide));
#pragma GCC unroll 8
                    for (int r = 0; r < 8; ++r) {
                        const int word = static_cast<int>(b_row[r * kSide + w]);
                        const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
                        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], a0, factor);
                        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], a1, factor);
                    }
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r) {
                _mm512_store_ps(at[0] + r * kSide, acc[r][0]), _mm512_store_ps(at[1] + r * kSide, acc[r][1]);
            }
        }
    }
};
#include "bf16_product_kernels.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

// What vdpbf16ps does, in its order: of a word the second product, then the first. Tests run the blocks with it where
// the processor has no unit.
namespace emulated {
struct Unit {
    static inline void multiply(float (*sums)[kTileWords], const uint32_t* b, const uint32_t* a, int64_t steps) {
        for (int64_t s = 0; s < steps; ++s, a += 2 * kTileWords, b += 2 * kTileWords) {
            for (int64_t n = 0; n < 2 * kSide; ++n) {
                for (int64_t half = 0; half < 2; ++half) {
                    float* row = sums[n / kSide * 2 + half] + n % kSide * kSide;
                    for (int64_t w = 0; w < kSide; ++w) {
                        const uint32_t word = b[n * kSide + w], *other = a + half * kTileWords + w * kSide;
                        const float low = as_float(word << 16), high = as_float(word & 0xFFFF0000u);
                        for (int64_t m = 0; m < kSide; ++m) {
                            row[m] += high * as_float(other[m] & 0xFFFF0000u);
                            row[m] += low * as_float(other[m] << 16);
                        }
                    }
                }
            }
        }
    }
};
#include "bf16_product_kernels.h"
}  // namespace emulated

// The fastest that this processor has.
static Bf16Unit bf16_unit() {
#ifdef EFFTUNE_BF16_UNITS
    static const Bf16Unit best = [] {
        const bool wide = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl");
        // Linux gives a process the 8 KB of tile registers when it asks: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
        if (wide && __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0) {
            return Bf16Unit::kAmx;
        }
        return wide && __builtin_cpu_supports("avx512bf16") ? Bf16Unit::kAvx512 : Bf16Unit::kNone;
    }();
    return best;
#else
    return Bf16Unit::kNone;
#endif
}

namespace {

template <class Pack, class Block>
void run(const ProductArgs& p, int threads, Pack pack, Block block) {
    const int64_t steps = ceil_div(p.k, 2 * kSide), pairs = ceil_div(p.m, 2 * kSide);
    const size_t bytes = static_cast<size_t>(pairs * steps * 2 * kTileWords) * sizeof(uint32_t);
    const auto release = [](uint32_t* at) { ::operator delete(at, std::align_val_t{64}); };
    const std::unique_ptr<uint32_t, decltype(release)> packed(
        static_cast<uint32_t*>(::operator new(std::max<size_t>(bytes, 64), std::align_val_t{64})), release);
    const int64_t row_blocks = ceil_div(pairs, kPairs), column_blocks = ceil_div(p.n, 2 * kSide);
    uint32_t* const a = packed.get();
#pragma omp parallel num_threads(threads) if (p.m * p.n * p.k > 1 << 16)
    {
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < pairs; ++pair) pack(p, pair, a);
#pragma omp for collapse(2) schedule(static)
        for (int64_t rows = 0; rows < row_blocks; ++rows) {
            for (int64_t cols = 0; cols < column_blocks; ++cols) block(p, a, rows * kPairs, cols * 2 * kSide);
        }
    }
}

}  // namespace

static void bf16_product(const ProductArgs& args, Bf16Unit unit, int threads) {
    switch (unit) {
#ifdef EFFTUNE_BF16_UNITS
        case Bf16Unit::kAmx:
            return run(args, threads, amx::pack_a, amx::product_block);
        case Bf16Unit::kAvx512:
            return run(args, threads, avx512::pack_a, avx512::product_block);
#endif
        default:
            return run(args, threads, emulated::pack_a, emulated::product_block);
    }
}

static const Register registered_unit("bf16_unit",
                                      [](Call& call) { call.answer(kUnitNames[static_cast<int>(bf16_unit())]); });

static const Register registered_product("bf16_product", [](Call& call) {
    ProductArgs p{};
    std::array<int64_t, 3> shape, strides;
    call.read(p.a, p.b, p.out, shape, strides);
    const char* const others = "bf16_product takes a unit that this processor has, or 'none'.";
    const auto unit = static_cast<Bf16Unit>(call.choice(kUnitNames, others));
    const int threads = call.threads();
    p.m = shape[0], p.n = shape[1], p.k = shape[2];
    p.a_stride = strides[0], p.b_stride = strides[1], p.out_stride = strides[2];
    call.check(p.m >= 0 && p.n >= 0 && p.k >= 0, "bf16_product takes sizes of at least 0.");
    call.check(unit <= bf16_unit(), others);
    call.run([&] { bf16_product(p, unit, threads); });
});

}  // namespace efftune
