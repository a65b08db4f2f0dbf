// w + Σ a z(seed, stream, offset + i), tile by tile, all seeds on a tile while it is in the first-level cache. Tiles
// start at multiples of kTile of the *offset*, so that a block of random numbers is always computed whole and in the
// same lanes, however the tensor is cut.
#include "perturb.h"

#include <algorithm>
#include <vector>

namespace efftune {
constexpr int kTile = 2048;
}

#define EFFTUNE_KERNELS "perturb_kernels.h"
#include "multiversion.h"

namespace efftune {

static void perturb(const PerturbArgs& args, int threads) {
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

static float draw(const PerturbArgs& args, int threads) {
    float used = 0.0f;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : used)
    for (int64_t tile = 0; tile < args.count / kTile; ++tile) {
        used += EFFTUNE_DISPATCH(draw_tile(args, args.offset + static_cast<uint64_t>(tile) * kTile, kTile));
    }
    return used;
}

static void set_seeds(PerturbArgs& args, const std::vector<uint64_t>& seeds) {
    args.seeds = seeds.data();
    args.seed = seeds.empty() ? 0 : seeds[0];
    args.draws = static_cast<int64_t>(seeds.size());
}

static const Register registered_perturb("perturb", [](Call& call) {
    PerturbArgs p{};
    std::vector<uint64_t> seeds;
    call.read(p.w, p.out, p.count, p.dtype, p.a, seeds, p.stream, p.offset, p.sign, p.stochastic, p.threshold);
    const int threads = call.threads();
    call.check(p.count >= 0, "perturb takes a count of at least 0.");
    set_seeds(p, seeds);
    call.run([&] { perturb(p, threads); });
});

static const Register registered_many("perturb_many", [](Call& call) {
    const std::vector<PerturbTensor> tensors = read_tensors(call);
    PerturbArgs p{};
    std::vector<uint64_t> seeds;
    call.read(p.dtype, p.a, seeds, p.sign, p.stochastic);
    const int threads = call.threads();
    set_seeds(p, seeds);
    call.run([&] {
        for (const PerturbTensor& t : tensors) {
            p.w = t.w, p.out = t.out, p.count = t.count, p.stream = t.stream, p.threshold = t.threshold;
            perturb(p, threads);
        }
    });
});

// The numbers alone, for bench/perturb.py.
static const Register registered_draw("draw", [](Call& call) {
    PerturbArgs p{};
    std::vector<uint64_t> seeds;
    call.read(p.count, seeds, p.stream, p.sign);
    const int threads = call.threads();
    call.check(p.count >= 0, "draw takes a count of at least 0.");
    set_seeds(p, seeds);
    float used = 0.0f;
    call.run([&] { used = draw(p, threads); });
    call.answer(used);
});

}  // namespace efftune
