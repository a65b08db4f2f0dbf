// w + Σ a z(seed, stream, offset + i) on a GPU: each thread owns eight consecutive offsets, which is two Gaussian
// blocks, one rounding block or a sixteenth of a sign block, and draws and sums them in registers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels.h"
#include "launch.h"

namespace efftune {
namespace {

constexpr int kEach = 8;

__device__ float load(float x) { return x; }
__device__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float load(__half x) { return __half2float(x); }

template <class T>
__device__ T store(float x, uint32_t random, bool stochastic);

template <>
__device__ float store<float>(float x, uint32_t, bool) {
    return x;
}

template <>
__device__ __nv_bfloat16 store<__nv_bfloat16>(float x, uint32_t random, bool stochastic) {
    return stochastic ? __ushort_as_bfloat16(BFloat16::store_stochastic(x, random)) : __float2bfloat16_rn(x);
}

template <>
__device__ __half store<__half>(float x, uint32_t random, bool stochastic) {
    return stochastic ? __ushort_as_half(Float16::store_stochastic(x, random)) : __float2half_rn(x);
}

template <bool kSigns>
__device__ void draw(float (&z)[kEach], uint32_t stream, uint64_t seed, uint64_t offset) {
    if constexpr (kSigns) {
        const Words w = philox(seed, offset >> 7, stream, kSign);
        const uint32_t which = (offset >> 5) & 3;
        const uint32_t word = which == 0 ? w.w0 : which == 1 ? w.w1 : which == 2 ? w.w2 : w.w3;
        for (int j = 0; j < kEach; ++j) z[j] = (word >> ((offset & 31) + j)) & 1 ? 1.0f : -1.0f;
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Words w = philox(seed, (offset >> 2) + half, stream, kGaussian);
            const Pair first = box_muller(w.w0, w.w1), second = box_muller(w.w2, w.w3);
            z[4 * half] = first.even, z[4 * half + 1] = first.odd;
            z[4 * half + 2] = second.even, z[4 * half + 3] = second.odd;
        }
    }
}

// kSingle, one seed: without a loop in whose favour the compiler keeps constants in registers, twice as many threads
// run at once. The arithmetic is the same.
template <class T, bool kSigns, bool kStochastic, bool kSingle>
__global__ void perturb_kernel(PerturbArgs p, bool aligned) {
    struct alignas(sizeof(T) * kEach < 16 ? sizeof(T) * kEach : 16) Pack {
        T at[kEach];
    };
    const T* w = static_cast<const T*>(p.w);
    T* out = static_cast<T*>(p.out);
    const uint64_t first = p.offset / kEach;
    const int64_t packs = static_cast<int64_t>((p.offset + p.count - 1) / kEach - first + 1);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t pack = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; pack < packs; pack += stride) {
        const uint64_t offset = (first + pack) * kEach;
        const int64_t i = static_cast<int64_t>(offset - p.offset);
        const bool whole = aligned && i >= 0 && i + kEach <= p.count;
        Pack x = {};
        if (whole) {
            x = *reinterpret_cast<const Pack*>(w + i);
        } else {
#pragma unroll
            for (int j = 0; j < kEach; ++j) {
                if (i + j >= 0 && i + j < p.count) x.at[j] = w[i + j];
            }
        }
        float y[kEach], z[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) y[j] = load(x.at[j]);
        const int64_t draws = kSingle ? 1 : p.draws;
#pragma unroll 1
        for (int64_t k = 0; k < draws; ++k) {
            draw<kSigns>(z, p.stream, kSingle ? p.seed : p.seeds[k], offset);
            const float a = p.a[k];
#pragma unroll
            for (int j = 0; j < kEach; ++j) y[j] = __fmaf_rn(a, z[j], y[j]);
        }
        uint32_t bits[4] = {};
        if (kStochastic) {
            const Words r = philox(p.seed, offset >> 3, p.stream, kRounding);
            bits[0] = r.w0, bits[1] = r.w1, bits[2] = r.w2, bits[3] = r.w3;
        }
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const uint32_t random = (bits[j >> 1] >> (16 * (j & 1))) & 0xFFFFu;
            if (fabsf(load(x.at[j])) <= p.threshold) x.at[j] = store<T>(y[j], random, kStochastic);
        }
        if (whole) {
            *reinterpret_cast<Pack*>(out + i) = x;
        } else {
#pragma unroll
            for (int j = 0; j < kEach; ++j) {
                if (i + j >= 0 && i + j < p.count) out[i + j] = x.at[j];
            }
        }
    }
}

template <class T>
cudaError_t launch(const PerturbArgs& args, cudaStream_t stream) {
    constexpr int kThreads = 256;
    // As many blocks as keep the processors busy, each with a loop over packs: what a thread computes before its loop
    // is then paid for once and not for every eight elements. Four times what fits at once, so that none waits long.
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int64_t blocks = (args.count / kEach + kThreads + 1) / kThreads, most = 32 * int64_t{processors};
    const int grid = static_cast<int>(blocks < most ? blocks : most);
    const auto skew = static_cast<int64_t>(args.offset % kEach) * static_cast<int64_t>(sizeof(T));
    const auto misaligned = [&](const void* p) { return (reinterpret_cast<uintptr_t>(p) - skew) % 16 != 0; };
    const bool aligned = !misaligned(args.w) && !misaligned(args.out);
    const bool stochastic = args.stochastic && args.draws > 0;
    const auto pick = [&](auto one) {
        constexpr bool kOne = decltype(one)::value;
        return args.sign ? (stochastic ? perturb_kernel<T, true, true, kOne> : perturb_kernel<T, true, false, kOne>)
                         : (stochastic ? perturb_kernel<T, false, true, kOne> : perturb_kernel<T, false, false, kOne>);
    };
    const auto kernel = args.draws == 1 ? pick(std::true_type{}) : pick(std::false_type{});
    return launch_kernel(kernel, grid, kThreads, 0, stream, args, aligned);
}

}  // namespace

const char* perturb_cuda(const PerturbArgs& args, void* stream) {
    if (args.count <= 0) return nullptr;
    const auto s = static_cast<cudaStream_t>(stream);
    const cudaError_t error = args.dtype == Dtype::kFloat32    ? launch<float>(args, s)
                              : args.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(args, s)
                                                               : launch<__half>(args, s);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace efftune
