// RMSNorm and LayerNorm: rows are independent, and gradients of the weight are summed in chunks of rows that do not
// depend on the number of threads.
#include <algorithm>
#include <vector>

#include "register.h"

namespace efftune {

struct NormArgs {
    const void* x;
    void* y;
    const float *gain, *bias;  // bias may be nullptr
    float *mean, *rstd;        // mean is nullptr where x is not centred
    int64_t rows, cols;
    float eps;
    Dtype dtype;
};

struct NormBackwardArgs {
    const void *dy, *x;
    const float *gain, *mean, *rstd;
    void* dx;
    float *dweight, *dbias;  // nullptr: not wanted
    int64_t rows, cols;
    Dtype dtype;
};

}  // namespace efftune

#define EFFTUNE_KERNELS "rms_norm_kernels.h"
#include "multiversion.h"

namespace efftune {

static void norm(const NormArgs& args, bool saved, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows * args.cols > 16384)
    for (int64_t row = 0; row < args.rows; ++row) EFFTUNE_DISPATCH(norm_row(args, row, saved));
}

static void sum_chunks(const std::vector<float>& partial, float* out, int64_t chunks, int64_t cols, int threads) {
    constexpr int64_t kBlock = 64;
#pragma omp parallel for schedule(static) num_threads(threads) if (chunks * cols > 16384)
    for (int64_t from = 0; from < cols; from += kBlock) {
        double sums[kBlock] = {};
        const int64_t count = std::min(kBlock, cols - from);
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int64_t k = 0; k < count; ++k) sums[k] += partial[chunk * cols + from + k];
        for (int64_t k = 0; k < count; ++k) out[from + k] = static_cast<float>(sums[k]);
    }
}

static void norm_backward(const NormBackwardArgs& args, int threads) {
    constexpr int64_t kChunk = 64;
    const int64_t chunks = (args.rows + kChunk - 1) / kChunk;
    std::vector<float> dweight(args.dweight ? chunks * args.cols : 0), dbias(args.dbias ? chunks * args.cols : 0);
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows * args.cols > 16384)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t from = chunk * kChunk, to = std::min(from + kChunk, args.rows);
        float* const dweight_row = args.dweight ? dweight.data() + chunk * args.cols : nullptr;
        float* const dbias_row = args.dbias ? dbias.data() + chunk * args.cols : nullptr;
        EFFTUNE_DISPATCH(norm_backward_rows(args, from, to, dweight_row, dbias_row));
    }
    if (args.dweight) sum_chunks(dweight, args.dweight, chunks, args.cols, threads);
    if (args.dbias) sum_chunks(dbias, args.dbias, chunks, args.cols, threads);
}

static const Register registered_norm("norm", [](Call& call) {
    NormArgs n{};
    bool saved = false;
    call.read(n.x, n.y, n.gain, n.bias, n.mean, n.rstd, n.rows, n.cols, n.eps, n.dtype, saved);
    const int threads = call.threads();
    call.check(n.rows >= 0 && n.cols > 0, "rms_norm takes at least one column.");
    call.run([&] { norm(n, saved, threads); });
});

static const Register registered_backward("norm_backward", [](Call& call) {
    NormBackwardArgs n{};
    call.read(n.dy, n.x, n.gain, n.mean, n.rstd, n.dx, n.dweight, n.dbias, n.rows, n.cols, n.dtype);
    const int threads = call.threads();
    call.check(n.rows >= 0 && n.cols > 0, "rms_norm takes at least one column.");
    call.run([&] { norm_backward(n, threads); });
});

}  // namespace efftune
