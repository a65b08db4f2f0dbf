// w + Σ a z(seed, stream, offset + i) on a GPU: each thread owns eight consecutive offsets, which is two Gaussian
// blocks, one rounding block or a sixteenth of a sign block, and draws and sums them in registers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "launch.h"
#include "perturb.h"

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

template <class T>
struct alignas(sizeof(T) * kEach < 16 ? sizeof(T) * kEach : 16) Pack {
    T at[kEach];
};

// The eight elements whose offsets begin at `offset`. kSingle, one seed: without a loop in whose favour the compiler
// keeps constants in registers, twice as many threads run at once. The arithmetic is the same.
template <class T, bool kSigns, bool kStochastic, bool kSingle>
__device__ void perturb_pack(const PerturbArgs& p, bool aligned, uint64_t offset) {
    const T* w = static_cast<const T*>(p.w);
    T* out = static_cast<T*>(p.out);
    const int64_t i = static_cast<int64_t>(offset - p.offset);
    const bool whole = aligned && i >= 0 && i + kEach <= p.count;
    Pack<T> x = {};
    if (whole) {
        x = *reinterpret_cast<const Pack<T>*>(w + i);
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
        *reinterpret_cast<Pack<T>*>(out + i) = x;
    } else {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            if (i + j >= 0 && i + j < p.count) out[i + j] = x.at[j];
        }
    }
}

template <class T, bool kSigns, bool kStochastic, bool kSingle>
__global__ void perturb_kernel(PerturbArgs p, bool aligned) {
    const uint64_t first = p.offset / kEach;
    const int64_t packs = static_cast<int64_t>((p.offset + p.count - 1) / kEach - first + 1);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t pack = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; pack < packs; pack += stride) {
        perturb_pack<T, kSigns, kStochastic, kSingle>(p, aligned, (first + pack) * kEach);
    }
}

// A kernel's arguments take 4 KB: the table travels with the launch, and is no copy of its own.
constexpr int kTensors = 64, kThreads = 256;

struct Table {
    const void* w[kTensors];
    void* out[kTensors];
    int64_t count[kTensors];
    int64_t behind[kTensors];  // chunks of this tensor and of those before it
    uint32_t stream[kTensors];
    float threshold[kTensors];
    bool aligned[kTensors];
};

// Chunks are what a block does at a time, kEach elements a thread, and lie within one tensor.
template <class T, bool kSigns, bool kStochastic, bool kSingle>
__global__ void perturb_many_kernel(Table table, PerturbArgs p, int64_t chunks) {
    int at = 0;
    for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        while (table.behind[at] <= chunk) ++at;  // chunks only rise
        const int64_t within = chunk - (at == 0 ? 0 : table.behind[at - 1]);
        const int64_t offset = (within * blockDim.x + threadIdx.x) * kEach;
        p.w = table.w[at];
        p.out = table.out[at];
        p.count = table.count[at];
        p.stream = table.stream[at];
        p.threshold = table.threshold[at];
        if (offset < p.count) perturb_pack<T, kSigns, kStochastic, kSingle>(p, table.aligned[at], offset);
    }
}

// As many blocks as keep the processors busy, each with a loop: what a thread computes before it is then paid for once
// and not for every eight elements. Four times what fits at once, so that none waits long.
cudaError_t grid_for(int64_t blocks, int* grid) {
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const int64_t most = 32 * int64_t{processors};
    *grid = static_cast<int>(blocks < most ? blocks : most);
    return error;
}

// use(sign, stochastic, single), each as a type.
template <class Use>
auto with_options(bool sign, bool stochastic, bool single, const Use& use) {
    const auto last = [&](auto s, auto r) {
        return single ? use(s, r, std::true_type{}) : use(s, r, std::false_type{});
    };
    const auto both = [&](auto s) { return stochastic ? last(s, std::true_type{}) : last(s, std::false_type{}); };
    return sign ? both(std::true_type{}) : both(std::false_type{});
}

template <class T>
cudaError_t launch(const PerturbArgs& args, cudaStream_t stream) {
    int grid = 0;
    const cudaError_t error = grid_for((args.count / kEach + kThreads + 1) / kThreads, &grid);
    if (error != cudaSuccess) return error;
    const auto skew = static_cast<int64_t>(args.offset % kEach) * static_cast<int64_t>(sizeof(T));
    const auto misaligned = [&](const void* p) { return (reinterpret_cast<uintptr_t>(p) - skew) % 16 != 0; };
    const bool aligned = !misaligned(args.w) && !misaligned(args.out);
    const auto kernel = with_options(
        args.sign, args.stochastic && args.draws > 0, args.draws == 1, [](auto sign, auto stochastic, auto single) {
            return perturb_kernel<T, decltype(sign)::value, decltype(stochastic)::value, decltype(single)::value>;
        });
    return launch_kernel(kernel, grid, kThreads, 0, stream, args, aligned);
}

template <class T>
cudaError_t launch_many(const PerturbArgs& args, const std::vector<PerturbTensor>& tensors, cudaStream_t stream) {
    const auto kernel = with_options(
        args.sign, args.stochastic && args.draws > 0, args.draws == 1, [](auto sign, auto stochastic, auto single) {
            return perturb_many_kernel<T, decltype(sign)::value, decltype(stochastic)::value, decltype(single)::value>;
        });
    const auto count = static_cast<int64_t>(tensors.size());
    for (int64_t first = 0; first < count; first += kTensors) {
        Table table = {};
        int64_t chunks = 0;
        for (int64_t i = 0; i < kTensors && first + i < count; ++i) {
            const PerturbTensor& t = tensors[first + i];
            chunks += (t.count + kEach * kThreads - 1) / (kEach * kThreads);
            table.w[i] = t.w, table.out[i] = t.out, table.count[i] = t.count, table.behind[i] = chunks;
            table.stream[i] = t.stream, table.threshold[i] = t.threshold;
            table.aligned[i] = (reinterpret_cast<uintptr_t>(t.w) | reinterpret_cast<uintptr_t>(t.out)) % 16 == 0;
        }
        int grid = 0;
        cudaError_t error = grid_for(chunks, &grid);
        if (error == cudaSuccess && chunks > 0) {
            error = launch_kernel(kernel, grid, kThreads, 0, stream, table, args, chunks);
        }
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

template <class Launch>
cudaError_t by_dtype(Dtype dtype, const Launch& launch) {
    return dtype == Dtype::kFloat32    ? launch(float{})
           : dtype == Dtype::kBFloat16 ? launch(__nv_bfloat16{})
                                       : launch(__half{});
}

// The stream is torch's current one; the caller sets the device.
const Register registered_perturb("perturb", [](Call& call) {
    PerturbArgs p{};
    cudaStream_t stream{};
    call.read(p.w, p.out, p.count, p.dtype, p.a, p.seeds, p.seed, p.draws, p.stream, p.offset, p.sign, p.stochastic,
              p.threshold, stream);
    call.end();
    call.check(p.count >= 0 && p.draws >= 0, "perturb takes a count of at least 0.");
    if (p.count == 0) return;
    const cudaError_t error = by_dtype(p.dtype, [&](auto one) { return launch<decltype(one)>(p, stream); });
    if (error != cudaSuccess) call.raise(Call::Error::kRuntime, "perturb did not start: %s", cudaGetErrorString(error));
});

const Register registered_many("perturb_many", [](Call& call) {
    const std::vector<PerturbTensor> tensors = read_tensors(call);
    PerturbArgs p{};
    cudaStream_t stream{};
    call.read(p.dtype, p.a, p.seeds, p.seed, p.draws, p.sign, p.stochastic, stream);
    call.end();
    call.check(p.draws >= 0, "perturb_many takes a number of draws of at least 0.");
    const cudaError_t error =
        by_dtype(p.dtype, [&](auto one) { return launch_many<decltype(one)>(p, tensors, stream); });
    if (error != cudaSuccess)
        call.raise(Call::Error::kRuntime, "perturb_many did not start: %s", cudaGetErrorString(error));
});

}  // namespace
}  // namespace efftune
