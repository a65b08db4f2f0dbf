// What the compiled kernels offer to cpu_module.cpp and cuda_module.cpp.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace efftune {

// 2: AVX-512, 1: AVX2, 0: what every processor has. Tests lower it, to hold the instruction sets against each other.
inline int isa_limit = 2;

struct PerturbArgs {
    const void* w;
    void* out;  // may be w
    int64_t count;
    Dtype dtype;
    float a;
    uint64_t seed;
    uint32_t stream;
    uint64_t offset;
    bool sign, stochastic;
};

void perturb(const PerturbArgs& args, int threads);
const char* perturb_cuda(const PerturbArgs& args, void* stream);  // nullptr, or what CUDA says

struct DropoutArgs {
    const void* x;
    void* out;
    int64_t count;
    Dtype dtype;
    uint32_t threshold;  // an element whose word is below it is dropped
    float scale;
    uint64_t seed;
    uint32_t stream;
};

void dropout(const DropoutArgs& args, int threads);

struct Int8Args {
    const int8_t* codes;
    const void* scales;
    void* out;
    int64_t rows, cols, group;
    Dtype scale_dtype, dtype;
};

void int8_dequantize(const Int8Args& args, int threads);

struct LinearCrossEntropyArgs {
    void* z;                 // (rows, cols): logits of the columns first..first + cols, replaced by their gradient
    const float* bias;       // (cols) or nullptr
    const int64_t* targets;  // (rows), inside the vocabulary or ignore_index
    float* norm;             // (2, rows): max and log Σ exp(y - max), written with the loss, else read
    float* loss;             // (rows) or nullptr; only for whole rows
    const float* dy;         // (rows), factors of the gradient, or nullptr
    int64_t rows, cols, first, vocabulary, ignore_index;
    Dtype dtype;
    float softcap, smoothing;  // 0: none
    bool gradient;
};

void linear_cross_entropy(const LinearCrossEntropyArgs& args, int threads);

}  // namespace efftune
