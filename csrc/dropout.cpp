// x scale where the element's Philox word reaches the threshold, else 0.
#include <algorithm>

#include "register.h"

namespace efftune {

struct DropoutArgs {
    const void* x;
    void* out;
    int64_t count;
    Dtype dtype;
    uint32_t threshold;  // an element whose word is below it is dropped
    float scale;
    uint64_t seed;
    uint32_t stream;
};

}  // namespace efftune

#define EFFTUNE_KERNELS "dropout_kernels.h"
#include "multiversion.h"

namespace efftune {

static void dropout(const DropoutArgs& args, int threads) {
    constexpr int64_t kTile = 2048;
    const int64_t tiles = (args.count + kTile - 1) / kTile;
#pragma omp parallel for schedule(static) num_threads(threads) if (tiles > 8)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t at = tile * kTile;
        EFFTUNE_DISPATCH(dropout_tile(args, at, static_cast<int>(std::min(kTile, args.count - at))));
    }
}

static const Register registered_dropout("dropout", [](Call& call) {
    DropoutArgs d{};
    call.read(d.x, d.out, d.count, d.dtype, d.threshold, d.scale, d.seed, d.stream);
    const int threads = call.threads();
    call.check(d.count >= 0, "dropout takes a count of at least 0.");
    call.run([&] { dropout(d, threads); });
});

}  // namespace efftune
