// Storage types and their conversions, written on integers and selects so that every loop over them vectorises.
#pragma once

#include <cstdint>

#include "philox.h"

namespace efftune {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16"};  // in the order of Dtype

struct Float32 {
    using Storage = float;
    static EFFTUNE_INLINE float load(float x) { return x; }
    static EFFTUNE_INLINE float store(float x) { return x; }
    static EFFTUNE_INLINE float store_stochastic(float x, uint32_t) { return x; }
};

struct BFloat16 {
    using Storage = uint16_t;
    static EFFTUNE_INLINE float load(uint16_t h) { return as_float(static_cast<uint32_t>(h) << 16); }

    static EFFTUNE_INLINE uint16_t store(float x) {
        const uint32_t bits = as_bits(x);
        const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
    }

    // P(up) is exactly the dropped fraction: 16 random bits meet the 16 dropped bits, subnormals included.
    static EFFTUNE_INLINE uint16_t store_stochastic(float x, uint32_t random) {
        const uint32_t bits = as_bits(x);
        const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
        const uint32_t nearest = store(x);
        return static_cast<uint16_t>(finite ? (bits + random) >> 16 : nearest);
    }
};

struct Float16 {
    using Storage = uint16_t;

    static EFFTUNE_INLINE float load(uint16_t h) {
        const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
        const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFFu) << 13;
        // Exponent bias 15 -> 127 by a product, which also normalises subnormals; infinities and NaN keep all ones.
        const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
        const uint32_t special = (magnitude & 0x0F800000u) == 0x0F800000u ? 0x7F800000u : 0u;
        return as_float(scaled | special | sign);
    }

    static EFFTUNE_INLINE uint16_t store(float x) {
        const uint32_t sign = as_bits(x) & 0x80000000u, magnitude = as_bits(x) ^ sign;
        // Below 2^-14 the float adder rounds: adding 1/2 leaves steps of 2^-24.
        const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
        const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
        const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
        const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
        return static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | (sign >> 16));
    }

    // Rounds to a multiple of the step at x: P(up) = dropped fraction, to 2^-17 of a step. Only subnormals drop more
    // than 16 bits; for normal numbers the fraction has 13 bits and P is exact.
    static EFFTUNE_INLINE uint16_t store_stochastic(float x, uint32_t random) {
        const uint32_t sign = as_bits(x) & 0x80000000u, magnitude = as_bits(x) ^ sign;
        // From 2^16 on everything becomes infinity, but NaN stays. One select would read better, but GCC then computes
        // the rest in a branch and the loop stays scalar, ten times slower.
        const uint32_t nan = magnitude > 0x7F800000u ? 0x7FC00000u : 0u;
        const uint32_t clamped = magnitude < 0x47800000u ? magnitude : 0x47800000u,
                       exponent = clamped < 0x38800000u ? 113u : clamped >> 23;
        const float step = as_float((exponent - 10u) << 23), per_step = as_float((264u - exponent) << 23);
        const float scaled = as_float(clamped) * per_step;
        const int32_t whole = static_cast<int32_t>(scaled);
        const float fraction = scaled - static_cast<float>(whole);
        const float threshold = (static_cast<float>(random) + 0.5f) * 0x1p-16f;
        const uint32_t rounded = as_bits(static_cast<float>(whole + (threshold < fraction)) * step);
        return store(as_float(rounded | nan | sign));
    }
};

// f(Float32{}), f(BFloat16{}) or f(Float16{}): of a generic lambda the one for this dtype.
template <class F>
EFFTUNE_INLINE auto visit(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::kFloat32:
            return f(Float32{});
        case Dtype::kBFloat16:
            return f(BFloat16{});
        default:
            return f(Float16{});
    }
}

}  // namespace efftune
