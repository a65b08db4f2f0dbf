// x scale where the element's Philox word reaches the threshold, else 0.
#include <algorithm>

#include "kernels.h"

#define EFFTUNE_KERNELS "dropout_kernels.h"
#include "multiversion.h"

namespace efftune {

void dropout(const DropoutArgs& args, int threads) {
    constexpr int64_t kTile = 2048;
    const int64_t tiles = (args.count + kTile - 1) / kTile;
#pragma omp parallel for schedule(static) num_threads(threads) if (tiles > 8)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t at = tile * kTile;
        EFFTUNE_DISPATCH(dropout_tile(args, at, static_cast<int>(std::min(kTile, args.count - at))));
    }
}

}  // namespace efftune
