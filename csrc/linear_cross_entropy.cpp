// Cross-entropy of a tile of logits, row by row: the gradient follows the statistics while the row is in the cache.
#include "register.h"

namespace efftune {

struct LinearCrossEntropyArgs {
    float* z;                // (rows, cols): logits of the columns first..first + cols, replaced by their gradient
    const float* bias;       // (cols) or nullptr
    const int64_t* targets;  // (rows), inside the vocabulary or ignore_index
    float* norm;             // (2, rows): max and 1 / Σ exp(y - max), written with the loss, else read
    float* loss;             // (rows) or nullptr; only for whole rows
    const float* dy;         // (rows), factors of the gradient, or nullptr
    int64_t rows, cols, first, vocabulary, ignore_index;
    float softcap, smoothing;  // 0: none
    bool gradient;
};

}  // namespace efftune

#define EFFTUNE_KERNELS "linear_cross_entropy_kernels.h"
#include "multiversion.h"

namespace efftune {

static void linear_cross_entropy(const LinearCrossEntropyArgs& args, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows * args.cols > 16384)
    for (int64_t row = 0; row < args.rows; ++row) EFFTUNE_DISPATCH(linear_cross_entropy_row(args, row));
}

static const Register registered_loss("linear_cross_entropy", [](Call& call) {
    LinearCrossEntropyArgs c{};
    call.read(c.z, c.bias, c.targets, c.norm, c.loss, c.dy, c.rows, c.cols, c.first, c.vocabulary, c.ignore_index,
              c.softcap, c.smoothing, c.gradient);
    const int threads = call.threads();
    call.check(c.rows >= 0 && c.cols > 0 && c.first >= 0 && c.first + c.cols <= c.vocabulary,
               "linear_cross_entropy takes columns inside the vocabulary, at least one.");
    call.run([&] { linear_cross_entropy(c, threads); });
});

}  // namespace efftune
