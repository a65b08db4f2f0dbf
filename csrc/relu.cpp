// relu with the bits of its derivative, and its gradient from these.
#include <algorithm>

#include "register.h"

namespace efftune {

struct ReluArgs {
    const void* x;  // dy in backward
    void* y;        // dx in backward
    uint8_t* bits;
    int64_t count;
    Dtype dtype;
    bool backward;
};

}  // namespace efftune

#define EFFTUNE_KERNELS "relu_kernels.h"
#include "multiversion.h"

namespace efftune {

static void relu(const ReluArgs& args, int threads) {
    constexpr int64_t kPiece = 16384;
#pragma omp parallel for schedule(static) num_threads(threads) if (args.count > kPiece)
    for (int64_t begin = 0; begin < args.count; begin += kPiece) {
        EFFTUNE_DISPATCH(relu_piece(args, begin, std::min(args.count, begin + kPiece)));
    }
}

static const Register registered_relu("relu", [](Call& call) {
    ReluArgs a{};
    call.read(a.x, a.y, a.bits, a.count, a.dtype, a.backward);
    const int threads = call.threads();
    call.check(a.count >= 0, "relu takes a count of at least 0.");
    call.run([&] { relu(a, threads); });
});

}  // namespace efftune
