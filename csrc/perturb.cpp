// w + Σ a z(seed, stream, offset + i), tile by tile, all seeds on a tile while it is in the first-level cache. Tiles
// start at multiples of kTile of the *offset*, so that a block of random numbers is always computed whole and in the
// same lanes, however the tensor is cut.
#include <algorithm>

#include "kernels.h"

namespace efftune {
constexpr int kTile = 2048;
}

#define EFFTUNE_KERNELS "perturb_kernels.h"
#include "multiversion.h"

namespace efftune {

void perturb(const PerturbArgs& args, int threads) {
    if (args.count <= 0) return;
    const uint64_t first_tile = args.offset / kTile, end = args.offset + static_cast<uint64_t>(args.count);
    const int64_t tiles = static_cast<int64_t>((end - 1) / kTile - first_tile + 1);
#pragma omp parallel for schedule(static) num_threads(threads) if (tiles * (args.draws + 1) > 16)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const uint64_t first = (first_tile + static_cast<uint64_t>(tile)) * kTile;
        const int from = first < args.offset ? static_cast<int>(args.offset - first) : 0;
        const int to = static_cast<int>(std::min<uint64_t>(kTile, end - first));
        EFFTUNE_DISPATCH(perturb_tile(args, first, static_cast<int64_t>(first - args.offset), from, to));
    }
}

float draw(const PerturbArgs& args, int threads) {
    float used = 0.0f;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : used)
    for (int64_t tile = 0; tile < args.count / kTile; ++tile) {
        used += EFFTUNE_DISPATCH(draw_tile(args, args.offset + static_cast<uint64_t>(tile) * kTile, kTile));
    }
    return used;
}

}  // namespace efftune
