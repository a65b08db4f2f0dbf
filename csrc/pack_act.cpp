// Group-wise affine codes of activations, 8 or 4 bits, stochastic rounding.
#include <algorithm>

#include "register.h"

namespace efftune {

struct PackArgs {
    const void* x;  // rows of cols elements, `stride` elements apart
    uint8_t* codes;
    uint16_t* stats;  // bfloat16: min and scale of each group
    int64_t rows, cols, stride, group;
    int bits;
    Dtype dtype;
    bool stochastic;
    uint64_t seed;
    uint32_t stream;
};

struct UnpackArgs {
    const uint8_t* codes;
    const uint16_t* stats;
    void* out;
    int64_t rows, cols, group;
    int bits;
    Dtype dtype;
};

}  // namespace efftune

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

static void pack_act(const PackArgs& args, int threads) {
    const Tiles tiles(args.rows, args.cols, args.group);
#pragma omp parallel for schedule(static) num_threads(threads) if (tiles.count > 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t begin = tile * tiles.size;
        EFFTUNE_DISPATCH(pack_groups(args, begin, std::min(begin + tiles.size, tiles.groups)));
    }
}

static void unpack_act(const UnpackArgs& args, int threads) {
    const Tiles tiles(args.rows, args.cols, args.group);
#pragma omp parallel for schedule(static) num_threads(threads) if (tiles.count > 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t begin = tile * tiles.size;
        EFFTUNE_DISPATCH(unpack_groups(args, begin, std::min(begin + tiles.size, tiles.groups)));
    }
}

static void check_groups(Call& call, int64_t rows, int64_t cols, int64_t group, int bits) {
    call.check(rows >= 0 && cols >= 0, "pack_act and unpack_act take sizes of at least 0.");
    call.check(group > 0 && (bits == 8 || (bits == 4 && group % 2 == 0)),
               "pack_act and unpack_act take 8 bits in groups of at least 1, or 4 bits in even groups.");
}

static const Register registered_pack("pack_act", [](Call& call) {
    PackArgs p{};
    call.read(p.x, p.codes, p.stats, p.rows, p.cols, p.stride, p.group, p.bits, p.dtype, p.stochastic, p.seed,
              p.stream);
    const int threads = call.threads();
    check_groups(call, p.rows, p.cols, p.group, p.bits);
    call.run([&] { pack_act(p, threads); });
});

static const Register registered_unpack("unpack_act", [](Call& call) {
    UnpackArgs u{};
    call.read(u.codes, u.stats, u.out, u.rows, u.cols, u.group, u.bits, u.dtype);
    const int threads = call.threads();
    check_groups(call, u.rows, u.cols, u.group, u.bits);
    call.run([&] { unpack_act(u, threads); });
});

}  // namespace efftune
