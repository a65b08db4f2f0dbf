// Group-wise symmetric int8: W = codes · scale, rounded once.
#include "kernels.h"

#define EFFTUNE_KERNELS "int8_kernels.h"
#include "multiversion.h"

namespace efftune {

void int8_dequantize(const Int8Args& args, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows * args.cols > 16384)
    for (int64_t row = 0; row < args.rows; ++row) EFFTUNE_DISPATCH(int8_row(args, row));
}

}  // namespace efftune
