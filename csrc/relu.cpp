// relu with the bits of its derivative, and its gradient from these.
#include <algorithm>

#include "kernels.h"

#define EFFTUNE_KERNELS "relu_kernels.h"
#include "multiversion.h"

namespace efftune {

void relu(const ReluArgs& args, int threads) {
    constexpr int64_t kPiece = 16384;
#pragma omp parallel for schedule(static) num_threads(threads) if (args.count > kPiece)
    for (int64_t begin = 0; begin < args.count; begin += kPiece) {
        EFFTUNE_DISPATCH(relu_piece(args, begin, std::min(args.count, begin + kPiece)));
    }
}

}  // namespace efftune
