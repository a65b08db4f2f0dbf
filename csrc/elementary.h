// exp, the logistic function and the normal distribution in float32, on integers and selects so that loops over them
// vectorise. Without fused multiply-adds, like everything here: vector bodies, tails and instruction sets agree.
#pragma once

#include "philox.h"

namespace efftune {

// exp(x + low) for x in [-120, 89] and |low| < 2^-4: Cephes' expf, 1 ulp. Underflow is gradual by way of two factors,
// because 2^-149 is no normal float.
EFFTUNE_INLINE float exp_sum(float x, float low) {
    const float shifted = x * 1.44269504088896341f + 12582912.0f;  // the adder rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f + low;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const int32_t exponent = static_cast<int32_t>(as_bits(shifted) - as_bits(12582912.0f)), half = exponent >> 1;
    const float first = as_float(static_cast<uint32_t>(half + 127) << 23);
    const float second = as_float(static_cast<uint32_t>(exponent - half + 127) << 23);
    return y * first * second;
}

struct Logistic {
    float value, rest;  // 1 / (1 + exp(-x)) and 1 / (1 + exp(x)), each exact relative to itself
};

// NaN passes every comparison here as false, and so through.
EFFTUNE_INLINE Logistic logistic(float x) {
    const float magnitude = as_float(as_bits(x) & 0x7FFFFFFFu);
    const float e = exp_sum(magnitude > 110.0f ? -110.0f : -magnitude, 0.0f);
    const float large = 1.0f / (1.0f + e), small = e * large;
    return {x < 0.0f ? small : large, x < 0.0f ? large : small};
}

struct Normal {
    float cdf, pdf;
};

// Both from one exp(-x^2 / 2): the tail is exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.35 |x|), with P fitted for a relative
// error of 3e-8 up to |x| = 15, where float32 has long underflowed. The tail is exact relative to itself, which
// (1 + erf) / 2 is not.
EFFTUNE_INLINE Normal normal(float x) {
    const float magnitude = as_float(as_bits(x) & 0x7FFFFFFFu), z = magnitude > 15.0f ? 15.0f : magnitude;
    const float t = 1.0f / (1.0f + 0.35f * z);
    float p = -0.02916425064200505f;
    p = p * t + 0.14406234512922916f;
    p = p * t - 0.2559049578431916f;
    p = p * t + 0.15939631973064855f;
    p = p * t - 0.023266078091896337f;
    p = p * t + 0.10557569984747098f;
    p = p * t + 0.11981528584311865f;
    p = p * t + 0.13986436302648675f;
    p = p * t + 0.1396212569921566f;
    const float head = as_float(as_bits(z) & 0xFFFFF000u), rest = z - head;  // 12 bits: head^2 is exact
    const float bell = exp_sum(-0.5f * head * head, -0.5f * rest * (z + head));
    const float tail = bell * (t * p);
    return {x < 0.0f ? tail : 1.0f - tail, bell * 0.398942280401432678f};
}

}  // namespace efftune
