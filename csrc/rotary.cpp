// Rotary position embedding, one token of one sample after the other, all heads of it in both tensors.
#include "kernels.h"

#define EFFTUNE_KERNELS "rotary_kernels.h"
#include "multiversion.h"

namespace efftune {

void rotary(const RotaryArgs& args, int threads) {
    const int64_t heads = args.tensors[0].heads + args.tensors[1].heads;
    const int64_t count = args.batch * heads * args.tokens * args.size;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (count > 16384)
    for (int64_t sample = 0; sample < args.batch; ++sample) {
        for (int64_t token = 0; token < args.tokens; ++token) EFFTUNE_DISPATCH(rotary_token(args, sample, token));
    }
}

}  // namespace efftune
