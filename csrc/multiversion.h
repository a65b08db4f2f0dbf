// Compiles the header named by EFFTUNE_KERNELS once per instruction set, in the namespaces avx512, avx2 and baseline;
// EFFTUNE_DISPATCH(f(x)) calls f of the best one that this processor runs. Include it outside every namespace.
//
// A wheel must run anywhere, so -march=native is out. target_clones does not reach the intrinsics in philox_lanes.h.
// EFFTUNE_LANES is the number of 64-bit lanes; __AVX512F__ and the like do not follow the pragma, because g++ reads the
// whole file before it obeys one. Compilers other than GCC on x86-64 get the baseline, with the same results.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "numeric.h"
#include "philox.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")
#define EFFTUNE_LANES 8
namespace efftune::avx512 {
namespace {
#include EFFTUNE_KERNELS
}
}  // namespace efftune::avx512
#undef EFFTUNE_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2")
#define EFFTUNE_LANES 4
namespace efftune::avx2 {
namespace {
#include EFFTUNE_KERNELS
}
}  // namespace efftune::avx2
#undef EFFTUNE_LANES
#pragma GCC pop_options

#define EFFTUNE_DISPATCH(call) \
    (efftune::isa() == 2 ? efftune::avx512::call : efftune::isa() == 1 ? efftune::avx2::call : efftune::baseline::call)
#else
#define EFFTUNE_DISPATCH(call) efftune::baseline::call
#endif

namespace efftune::baseline {
namespace {
#include EFFTUNE_KERNELS
}
}  // namespace efftune::baseline
