// The conversions of CUDA's header that csrc takes.
#pragma once

#include "numeric.h"

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) { return efftune::Float16::load(x.bits); }
inline __half __float2half_rn(float x) { return {efftune::Float16::store(x)}; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
