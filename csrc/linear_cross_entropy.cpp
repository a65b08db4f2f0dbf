// Cross-entropy of a tile of logits, row by row: the gradient follows the statistics while the row is in the cache.
#include "kernels.h"

#define EFFTUNE_KERNELS "linear_cross_entropy_kernels.h"
#include "multiversion.h"

namespace efftune {

void linear_cross_entropy(const LinearCrossEntropyArgs& args, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows * args.cols > 16384)
    for (int64_t row = 0; row < args.rows; ++row) EFFTUNE_DISPATCH(linear_cross_entropy_row(args, row));
}

}  // namespace efftune
