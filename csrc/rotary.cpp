// Rotary position embedding, one token of one sample after the other, all heads of it in both tensors.
#include "register.h"

namespace efftune {

struct RotaryHeads {
    const void* x;
    void* out;
    int64_t heads;
    std::array<int64_t, 3> x_stride, out_stride;  // from sample to sample, head to head, token to token
};

struct RotaryArgs {
    std::array<RotaryHeads, 2> tensors;  // (B, H, T, D), which differ in H; elements of a row are adjacent everywhere
    const void *cos, *sin;
    int64_t batch, tokens, size;
    std::array<int64_t, 2> cos_stride, sin_stride;  // from sample to sample (0: shared), token to token
    Dtype dtype, table_dtype;                       // of the tensors; of cos and sin
    bool transposed;
};

}  // namespace efftune

#define EFFTUNE_KERNELS "rotary_kernels.h"
#include "multiversion.h"

namespace efftune {

static void rotary(const RotaryArgs& args, int threads) {
    const int64_t heads = args.tensors[0].heads + args.tensors[1].heads;
    const int64_t count = args.batch * heads * args.tokens * args.size;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (count > 16384)
    for (int64_t sample = 0; sample < args.batch; ++sample) {
        for (int64_t token = 0; token < args.tokens; ++token) EFFTUNE_DISPATCH(rotary_token(args, sample, token));
    }
}

static const Register registered_rotary("rotary", [](Call& call) {
    RotaryArgs r{};
    for (RotaryHeads& t : r.tensors) {
        if (&t != &r.tensors[0] && call.none()) continue;
        call.read_tuple(t.x, t.out, t.heads, t.x_stride, t.out_stride);
        call.check(t.heads >= 0, "rotary takes sizes of at least 0.");
    }
    call.read(r.cos, r.sin, r.batch, r.tokens, r.size, r.cos_stride, r.sin_stride, r.dtype, r.table_dtype,
              r.transposed);
    const int threads = call.threads();
    call.check(r.batch >= 0 && r.tokens >= 0 && r.size >= 0 && r.size % 2 == 0,
               "rotary takes sizes of at least 0 and an even number of columns.");
    call.run([&] { rotary(r, threads); });
});

}  // namespace efftune
