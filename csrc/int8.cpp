// Group-wise symmetric int8: W = codes · scale, rounded once.
#include "register.h"

namespace efftune {

struct Int8Args {
    const int8_t* codes;
    const void* scales;
    void* out;
    int64_t rows, cols, group;
    Dtype scale_dtype, dtype;
};

}  // namespace efftune

#define EFFTUNE_KERNELS "int8_kernels.h"
#include "multiversion.h"

namespace efftune {

static void int8_dequantize(const Int8Args& args, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows * args.cols > 16384)
    for (int64_t row = 0; row < args.rows; ++row) EFFTUNE_DISPATCH(int8_row(args, row));
}

static const Register registered_dequantize("int8_dequantize", [](Call& call) {
    Int8Args q{};
    call.read(q.codes, q.scales, q.out, q.rows, q.cols, q.group, q.scale_dtype, q.dtype);
    const int threads = call.threads();
    call.check(q.rows >= 0 && q.cols >= 0 && q.group > 0,
               "int8_dequantize takes sizes of at least 0 and a group of at least 1.");
    call.run([&] { int8_dequantize(q, threads); });
});

}  // namespace efftune
