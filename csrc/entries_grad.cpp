// gᵀz at some of its entries: dot products of columns, which are rows of a block of tokens that was transposed.
#include <algorithm>
#include <type_traits>

#include "entries.h"

namespace efftune {

struct EntriesArgs {
    const void *g, *z;  // (m, n) and (m, k)
    const int32_t* indices;
    float* out;
    uint32_t* block;  // (n + k, pitch)
    int64_t m, n, k, g_stride, z_stride, count, tokens, pitch;
    Dtype dtype;
};

constexpr int kSums = 16;  // fixed: the order of the sums must not depend on the instruction set

template <class T>
constexpr int kTokens = std::is_same_v<T, BFloat16> ? 2 : 1;  // in a word of a block

template <class T>
constexpr int64_t words_of(int64_t tokens) {
    return (tokens + kSums * kTokens<T> - 1) / (kSums * kTokens<T>)*kSums;
}

}  // namespace efftune

#define EFFTUNE_KERNELS "entries_grad_kernels.h"
#include "multiversion.h"

namespace efftune {

static void entries_grad(const EntriesArgs& args, int threads) {
    // 32 columns of float32, narrow parts of distant rows, took 2.5 times as long to transpose.
    constexpr int64_t kColumns = 256, kEntries = 256;
#pragma omp parallel num_threads(threads) if (args.m * (args.n + args.k) > 16384)
    for (int64_t first = 0; first < args.m; first += args.tokens) {
        const int64_t tokens = std::min(args.tokens, args.m - first);
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < args.n; c += kColumns)
            EFFTUNE_DISPATCH(entries_transpose(args, first, tokens, false, c, std::min(c + kColumns, args.n)));
#pragma omp for schedule(static)
        for (int64_t c = 0; c < args.k; c += kColumns)
            EFFTUNE_DISPATCH(entries_transpose(args, first, tokens, true, c, std::min(c + kColumns, args.k)));
#pragma omp for schedule(static)
        for (int64_t s = 0; s < args.count; s += kEntries)
            EFFTUNE_DISPATCH(entries_dots(args, first, tokens, s, std::min(s + kEntries, args.count)));
    }
}

static const Register registered_entries_grad("entries_grad", [](Call& call) {
    EntriesArgs a{};
    std::array<int64_t, 3> shape;
    std::array<int64_t, 2> strides;
    call.read(a.g, a.z, a.indices, a.out, a.block, shape, strides, a.count, a.tokens, a.pitch, a.dtype);
    const int threads = call.threads();
    a.m = shape[0], a.n = shape[1], a.k = shape[2], a.g_stride = strides[0], a.z_stride = strides[1];
    call.check(a.m >= 0 && a.n >= 0 && a.k >= 0 && a.count >= 0, "entries_grad takes sizes of at least 0.");
    const int64_t words = a.dtype == Dtype::kBFloat16 ? words_of<BFloat16>(a.tokens) : words_of<Float32>(a.tokens);
    call.check(a.tokens > 0 && words <= a.pitch, "entries_grad takes blocks of at least one token, and their pitch.");
    check_entries(call, a.indices, a.count, a.n * a.k);
    call.run([&] { entries_grad(a, threads); });
});

}  // namespace efftune
