// Group-wise affine codes of activations, 8 or 4 bits, stochastic rounding.
#include <algorithm>

#include "kernels.h"

#define EFFTUNE_KERNELS "pack_act_kernels.h"
#include "multiversion.h"

namespace efftune {

namespace {

struct Tiles {
    int64_t groups, size, count;  // a tile is `size` groups, about 16,384 elements

    Tiles(int64_t rows, int64_t cols, int64_t group)
        : groups(rows * ((cols + group - 1) / group)),
          size(std::max<int64_t>(1, 16384 / std::min(std::max<int64_t>(cols, 1), group))),
          count((groups + size - 1) / size) {}
};

}  // namespace

void pack_act(const PackArgs& args, int threads) {
    const Tiles tiles(args.rows, args.cols, args.group);
#pragma omp parallel for schedule(static) num_threads(threads) if (tiles.count > 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t begin = tile * tiles.size;
        EFFTUNE_DISPATCH(pack_groups(args, begin, std::min(begin + tiles.size, tiles.groups)));
    }
}

void unpack_act(const UnpackArgs& args, int threads) {
    const Tiles tiles(args.rows, args.cols, args.group);
#pragma omp parallel for schedule(static) num_threads(threads) if (tiles.count > 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t begin = tile * tiles.size;
        EFFTUNE_DISPATCH(unpack_groups(args, begin, std::min(begin + tiles.size, tiles.groups)));
    }
}

}  // namespace efftune
