// weight_s · g[idx_s], the operand of a sampled weight gradient; the product is torch's.
#include <algorithm>

#include "sample_rows.h"

namespace efftune {

struct ScaleRowsArgs {
    const void* g;
    const int64_t* idx;
    const float* weight;
    void* out;
    int64_t cols, stride, kept;
    bool transposed;
    Dtype dtype;
};

}  // namespace efftune

#define EFFTUNE_KERNELS "rows_grad_kernels.h"
#include "multiversion.h"

namespace efftune {

static void scale_rows(const ScaleRowsArgs& args, int threads) {
    constexpr int64_t kTile = 32;
#pragma omp parallel for schedule(static) num_threads(threads) if (args.kept * args.cols > 16384)
    for (int64_t from = 0; from < args.kept; from += kTile)
        EFFTUNE_DISPATCH(scale_tile(args, from, std::min(from + kTile, args.kept)));
}

static const Register registered_scale("scale_rows", [](Call& call) {
    ScaleRowsArgs a{};
    int64_t rows = 0;
    call.read(a.g, a.idx, a.weight, a.out, rows, a.cols, a.stride, a.kept, a.transposed, a.dtype);
    const int threads = call.threads();
    check_rows(call, a.idx, a.kept, rows, a.cols);
    call.run([&] { scale_rows(a, threads); });
});

}  // namespace efftune
