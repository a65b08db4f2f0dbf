// act(gate) up and its gradients, in pieces of rows.
#include <algorithm>

#include "elementary.h"
#include "kernels.h"

#define EFFTUNE_KERNELS "glu_kernels.h"
#include "multiversion.h"

namespace efftune {

void glu(const GluArgs& args, int threads) {
    constexpr int64_t kPiece = 4096;
    const int64_t pieces = (args.cols + kPiece - 1) / kPiece;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (args.rows * args.cols > 16384)
    for (int64_t row = 0; row < args.rows; ++row) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t col = piece * kPiece;
            EFFTUNE_DISPATCH(glu_piece(args, row, col, std::min(kPiece, args.cols - col)));
        }
    }
}

}  // namespace efftune
