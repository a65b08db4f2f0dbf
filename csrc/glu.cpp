// act(gate) up and its gradients, in pieces of rows.
#include <algorithm>

#include "elementary.h"
#include "register.h"

namespace efftune {

struct GluArgs {
    const void *gate, *up, *dy;  // up may be nullptr; dy is nullptr in forward
    void *y, *dgate, *dup;       // y in forward, else the other two
    int64_t rows, cols, gate_stride, up_stride, dy_stride;
    int activation;  // its index in kActivations
    Dtype dtype;
};

}  // namespace efftune

#define EFFTUNE_KERNELS "glu_kernels.h"
#include "multiversion.h"

namespace efftune {

static void glu(const GluArgs& args, int threads) {
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

static const Register registered_glu("glu", [](Call& call) {
    GluArgs a{};
    call.read(a.gate, a.up, a.dy, a.y, a.dgate, a.dup, a.rows, a.cols, a.gate_stride, a.up_stride, a.dy_stride);
    a.activation = call.choice(baseline::kActivations);
    call.read(a.dtype);
    const int threads = call.threads();
    call.check(a.rows >= 0 && a.cols >= 0, "glu takes sizes of at least 0.");
    call.run([&] { glu(a, threads); });
});

}  // namespace efftune
