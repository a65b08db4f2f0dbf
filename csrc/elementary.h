// exp, the logistic function and the normal distribution in float32, on integers and selects so that loops over them
// vectorise. Without fused multiply-adds, like everything here: vector bodies, tails and instruction sets agree.
#pragma once

#include "philox.h"

namespace efftune {

// exp(x + low) for x in [-87, 87] and |low| < 2^-4: Cephes' expf, 1 ulp. The exponent is read from the low bits of the
// sum that rounds, and multiplied in: an integer added to the bits of NaN could make it a number.
EFFTUNE_INLINE float exp_sum(float x, float low) {
    const float shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f + low;
    const float sq = r * r;  // pairs, not Horner's chain: the latency of this function is what it costs
    const float high = (1.9875691500e-4f * r + 1.3981999507e-3f) * sq + (8.3334519073e-3f * r + 4.1665795894e-2f);
    const float y = (high * sq + (1.6666665459e-1f * r + 5.0000001201e-1f)) * sq + r + 1.0f;
    return y * as_float((as_bits(shifted) + 127u) << 23);
}

// Activations take two steps, so that a loop over each has enough iterations in flight: first exp of something at most
// 0, then the rest. NaN passes every comparison here as false, and so through.

EFFTUNE_INLINE float magnitude(float x) { return as_float(as_bits(x) & 0x7FFFFFFFu); }

// exp(-|x|), 0 beyond 87.
EFFTUNE_INLINE float exp_decay(float x) {
    const float z = magnitude(x);
    return z > 87.0f ? 0.0f : exp_sum(-z, 0.0f);
}

struct Logistic {
    float value, rest;  // 1 / (1 + exp(-x)) and 1 / (1 + exp(x)), each to 2 ulp
};

EFFTUNE_INLINE Logistic logistic(float x, float decay) {
    const float large = 1.0f / (1.0f + decay), small = decay * large;
    return {x < 0.0f ? small : large, x < 0.0f ? large : small};
}

// exp(-x^2 / 2), 0 beyond 13.
EFFTUNE_INLINE float exp_bell(float x) {
    const float z = magnitude(x), head = as_float(as_bits(z) & 0xFFFFF000u), rest = z - head;  // 12 bits: exact squares
    return z > 13.0f ? 0.0f : exp_sum(-0.5f * head * head, -0.5f * rest * (z + head));
}

struct Normal {
    float cdf, pdf;
};

// The tail is exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.35 |x|), with P fitted for a relative error of 3e-8: right to 4 ulp
// of itself, which (1 + erf) / 2 is not.
EFFTUNE_INLINE Normal normal(float x, float bell) {
    const float t = 1.0f / (1.0f + 0.35f * magnitude(x)), sq = t * t;
    const float p_high = -0.02916425064200505f * sq + (0.14406234512922916f * t - 0.2559049578431916f);
    const float p54 = 0.15939631973064855f * t - 0.023266078091896337f;
    const float p32 = 0.10557569984747098f * t + 0.11981528584311865f;
    const float p10 = 0.13986436302648675f * t + 0.1396212569921566f;
    const float tail = bell * (t * (((p_high * sq + p54) * sq + p32) * sq + p10));
    return {x < 0.0f ? tail : 1.0f - tail, bell * 0.398942280401432678f};
}

}  // namespace efftune
