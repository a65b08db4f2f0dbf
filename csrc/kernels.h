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

struct RowNormsArgs {
    const void* x;
    int64_t stride;  // elements from row to row
    float* out;
    int64_t rows, cols;
    Dtype dtype;
};

void row_norms(const RowNormsArgs& args, int threads);

enum class Sampler : int { kSystematic = 0, kWta = 1, kCrs = 2, kTopk = 3 };  // as in efftune/ops/sample_rows.py

struct SelectRowsArgs {
    const float* scores;
    int64_t rows, kept;
    uint64_t seed;
    uint32_t stream;
    Sampler sampler;
    int64_t* idx;
    float* weight;
    int32_t* fallback;
};

void select_rows(const SelectRowsArgs& args);
constexpr int64_t kMaxCudaRows = 8192;
const char* select_rows_cuda(const SelectRowsArgs& args, void* stream);  // systematic, up to kMaxCudaRows

struct GatherRowsArgs {
    const void* x;
    const int64_t* idx;
    void* out;
    int64_t cols, stride, kept;
    int itemsize;
};

void gather_rows(const GatherRowsArgs& args, int threads);

struct ScaleRowsArgs {
    const void* g;
    const int64_t* idx;
    const float* weight;
    void* out;
    int64_t cols, stride, kept;
    bool transposed;
    Dtype dtype;
};

void scale_rows(const ScaleRowsArgs& args, int threads);

}  // namespace efftune
