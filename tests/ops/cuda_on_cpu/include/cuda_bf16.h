// The conversions of CUDA's header that csrc takes.
#pragma once

#include "numeric.h"

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return efftune::BFloat16::load(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {efftune::BFloat16::store(x)}; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
