// weight_s · g[idx_s], the operand of a sampled weight gradient; the product is torch's.
#include <algorithm>

#include "kernels.h"

#define EFFTUNE_KERNELS "rows_grad_kernels.h"
#include "multiversion.h"

namespace efftune {

void scale_rows(const ScaleRowsArgs& args, int threads) {
    constexpr int64_t kTile = 32;
#pragma omp parallel for schedule(static) num_threads(threads) if (args.kept * args.cols > 16384)
    for (int64_t from = 0; from < args.kept; from += kTile)
        EFFTUNE_DISPATCH(scale_tile(args, from, std::min(from + kTile, args.kept)));
}

}  // namespace efftune
