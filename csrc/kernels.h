// What the compiled kernels offer to cpu_module.cpp and cuda_module.cpp.
#pragma once

#include <array>
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
    const float* a;         // (draws), on the GPU for a kernel there
    const uint64_t* seeds;  // (draws), as a; not read on a GPU where there is one seed
    uint64_t seed;          // seeds[0], whose bits round
    int64_t draws;
    uint32_t stream;
    uint64_t offset;
    bool sign, stochastic;
    float threshold;  // weights above it in magnitude, and NaN, stay as they are
};

void perturb(const PerturbArgs& args, int threads);
float draw(const PerturbArgs& args, int threads);                 // the numbers alone, for bench/perturb.py
const char* perturb_cuda(const PerturbArgs& args, void* stream);  // nullptr, or what CUDA says

struct PerturbTensor {
    const void* w;
    void* out;  // may be w
    int64_t count;
    uint32_t stream;
    float threshold;
};

// What differs between the tensors, and the rest in `args`, whose offset is 0.
const char* perturb_many_cuda(const PerturbArgs& args, const PerturbTensor* tensors, int64_t count, void* stream);

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

struct PackArgs {
    const void* x;  // rows of cols elements, `stride` elements apart
    uint8_t* codes;
    uint16_t* stats;  // bfloat16: min and scale of each group
    int64_t rows, cols, stride, group;
    int bits;
    Dtype dtype;
    bool stochastic;
    uint64_t seed;
    uint32_t stream;
};

void pack_act(const PackArgs& args, int threads);

struct UnpackArgs {
    const uint8_t* codes;
    const uint16_t* stats;
    void* out;
    int64_t rows, cols, group;
    int bits;
    Dtype dtype;
};

void unpack_act(const UnpackArgs& args, int threads);

struct NormArgs {
    const void* x;
    void* y;
    const float *gain, *bias;  // bias may be nullptr
    float *mean, *rstd;        // mean is nullptr where x is not centred
    int64_t rows, cols;
    float eps;
    Dtype dtype;
};

void norm(const NormArgs& args, bool saved, int threads);  // saved: mean and rstd are given

struct NormBackwardArgs {
    const void *dy, *x;
    const float *gain, *mean, *rstd;
    void* dx;
    float *dweight, *dbias;  // nullptr: not wanted
    int64_t rows, cols;
    Dtype dtype;
};

void norm_backward(const NormBackwardArgs& args, int threads);

enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

struct GluArgs {
    const void *gate, *up, *dy;  // up may be nullptr; dy is nullptr in forward
    void *y, *dgate, *dup;       // y in forward, else the other two
    int64_t rows, cols, gate_stride, up_stride, dy_stride;
    Activation activation;
    Dtype dtype;
};

void glu(const GluArgs& args, int threads);

struct ReluArgs {
    const void* x;  // dy in backward
    void* y;        // dx in backward
    uint8_t* bits;
    int64_t count;
    Dtype dtype;
    bool backward;
};

void relu(const ReluArgs& args, int threads);

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

void rotary(const RotaryArgs& args, int threads);

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

struct LinearCrossEntropyArgs {
    float* z;                // (rows, cols): logits of the columns first..first + cols, replaced by their gradient
    const float* bias;       // (cols) or nullptr
    const int64_t* targets;  // (rows), inside the vocabulary or ignore_index
    float* norm;             // (2, rows): max and 1 / Σ exp(y - max), written with the loss, else read
    float* loss;             // (rows) or nullptr; only for whole rows
    const float* dy;         // (rows), factors of the gradient, or nullptr
    int64_t rows, cols, first, vocabulary, ignore_index;
    float softcap, smoothing;  // 0: none
    bool gradient;
};

void linear_cross_entropy(const LinearCrossEntropyArgs& args, int threads);

struct ProductArgs {
    const uint16_t *a, *b;  // bfloat16 (m, k) and (n, k): rows are strides apart, their elements adjacent
    float* out;             // (m, n): a bᵀ
    int64_t m, n, k, a_stride, b_stride, out_stride;
};

enum class Bf16Unit : int { kNone = 0, kAvx512 = 1, kAmx = 2 };  // kNone: what the units do in plain C++, for tests

Bf16Unit bf16_unit();  // the fastest that this processor has
void bf16_product(const ProductArgs& args, Bf16Unit unit, int threads);

}  // namespace efftune
