// y += x Sᵀ and dx += dy S, where S is 0 but for some entries: for 16 tokens at a time their columns lie together, and
// an entry is a product of two registers.
#include <algorithm>
#include <type_traits>

#include "entries.h"

namespace efftune {

constexpr int64_t kTokens = 16, kSpare = 16;  // of a block: its tokens, and rows beyond the last column

struct EntriesLinearArgs {
    void* y;        // (m, n), or where it is transposed (m, k)
    const void* x;  // (m, k), or (m, n)
    const int32_t* indices;
    const float* values;
    float* blocks;  // one for each thread, (n + k + kSpare, kTokens)
    int64_t m, n, k, y_stride, x_stride, count;
    bool transposed;
    Dtype dtype;

    int64_t from() const { return transposed ? n : k; }
    int64_t to() const { return transposed ? k : n; }
};

}  // namespace efftune

#define EFFTUNE_KERNELS "entries_linear_kernels.h"
#include "multiversion.h"

namespace efftune {

static void entries_linear(const EntriesLinearArgs& args, int parts) {
    const int64_t blocks = (args.m + kTokens - 1) / kTokens, size = (args.n + args.k + kSpare) * kTokens;
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; ++part)
        for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b)
            EFFTUNE_DISPATCH(entries_linear_tokens(args, b * kTokens, args.blocks + part * size));
}

static const Register registered_entries_linear("entries_linear", [](Call& call) {
    EntriesLinearArgs a{};
    std::array<int64_t, 3> shape;
    std::array<int64_t, 2> strides;
    call.read(a.y, a.x, a.indices, a.values, a.blocks, shape, strides, a.count, a.transposed, a.dtype);
    const int parts = call.threads();
    a.m = shape[0], a.n = shape[1], a.k = shape[2], a.y_stride = strides[0], a.x_stride = strides[1];
    call.check(a.m >= 0 && a.n >= 0 && a.k >= 0 && a.count >= 0, "entries_linear takes sizes of at least 0.");
    check_entries(call, a.indices, a.count, a.n * a.k);
    call.run([&] { entries_linear(a, parts); });
});

}  // namespace efftune
