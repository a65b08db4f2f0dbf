// Runs CUDA kernels on the CPU, compiled by a C++ compiler: a block's threads are fibers, which run one after another
// from barrier to barrier, in a random order. What then throws: a barrier that not all threads of a block reach, or not
// the same one; a write beyond a block's shared memory; a launch that no GPU would take. What shows in the results,
// which are compared with another backend's: shared memory that is read before it is written, or by one thread while
// another writes it, since both depend on random numbers here.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }

struct Dim {
    unsigned x = 1;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

namespace cuda_on_cpu {

constexpr size_t kDefaultShared = 48 << 10, kMaxShared = 227 << 10;  // bytes of a block: unasked, and on sm_90
constexpr size_t kGuard = 64 << 10, kStack = 128 << 10;

struct Fiber {
    enum State { kReady, kWaiting, kDone };

    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    const char* file;  // of the barrier at which it waits
    int line;
};

inline std::mt19937_64 random{1};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int any_now, any_before;  // of __syncthreads_or: what is gathered, and what the last barrier gathered
inline std::map<const void*, size_t> allowed;  // by kernel
alignas(128) inline char region[kGuard + kMaxShared + kGuard];

[[noreturn]] inline void fail(const std::string& sentence) { throw std::runtime_error("CUDA on a CPU: " + sentence); }

inline std::vector<unsigned> shuffled(unsigned count) {
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    return order;
}

inline void run_thread() {
    body();
    Fiber& me = fibers[threadIdx.x];
    me.state = Fiber::kDone;
    setcontext(&scheduler);
}

inline void barrier(const char* file, int line) {
    Fiber& me = fibers[threadIdx.x];
    me.state = Fiber::kWaiting, me.file = file, me.line = line;
    swapcontext(&me.context, &scheduler);
}

// Lets each thread run to its next barrier or to its end; whether any waits.
inline bool run_to_barrier(unsigned threads) {
    for (unsigned t : shuffled(threads)) {
        threadIdx.x = t;
        fibers[t].state = Fiber::kReady;
        swapcontext(&scheduler, &fibers[t].context);
    }
    const Fiber& first = fibers[0];
    for (unsigned t = 1; t < threads; ++t) {
        if (fibers[t].state != first.state) fail("a barrier is not reached by all threads of a block.");
        if (first.state == Fiber::kWaiting && (fibers[t].line != first.line || strcmp(fibers[t].file, first.file) != 0))
            fail("the threads of a block wait at different barriers.");
    }
    any_before = any_now, any_now = 0;
    return first.state == Fiber::kWaiting;
}

inline void run_block(unsigned threads, size_t shared) {
    const uint64_t poison = random();
    const auto is = [&](size_t i) { return static_cast<char>(poison >> 8 * (i % 8)); };
    const size_t used = (kGuard + shared + kGuard) / 8;
    for (size_t i = 0; i < used; ++i) memcpy(region + 8 * i, &poison, 8);
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[t];
        if (!fiber.stack) fiber.stack.reset(new char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, run_thread, 0);
    }
    while (run_to_barrier(threads)) {
    }
    for (size_t i = 0; i < 8 * used; ++i)
        if ((i < kGuard || i >= kGuard + shared) && region[i] != is(i)) fail("a write beyond the shared memory.");
}

}  // namespace cuda_on_cpu

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_on_cpu::barrier(file, line);
}

inline int __syncthreads_or(int mine, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_on_cpu::any_now |= mine != 0;
    cuda_on_cpu::barrier(file, line);
    return cuda_on_cpu::any_before;
}

template <class K>
cudaError_t cudaFuncSetAttribute(K* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > cuda_on_cpu::kMaxShared) return cudaErrorInvalidValue;
    cuda_on_cpu::allowed[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
    return cudaSuccess;
}

// What csrc/launch.h is under nvcc.
namespace efftune {

template <class T>
T& shared_memory() {
    return *reinterpret_cast<T*>(cuda_on_cpu::region + cuda_on_cpu::kGuard);
}

template <class... P, class... A>
cudaError_t launch_kernel(void (*kernel)(P...), int grid, int threads, size_t shared, cudaStream_t, A... args) {
    using namespace cuda_on_cpu;
    const auto found = allowed.find(reinterpret_cast<const void*>(kernel));
    if (grid < 1 || threads < 1 || threads > 1024 || shared > (found == allowed.end() ? kDefaultShared : found->second))
        fail("no GPU takes a launch of this size.");
    gridDim.x = static_cast<unsigned>(grid), blockDim.x = static_cast<unsigned>(threads);
    body = [&] { kernel(args...); };
    for (unsigned block : shuffled(gridDim.x)) {
        blockIdx.x = block;
        run_block(blockDim.x, shared);
    }
    return cudaSuccess;
}

}  // namespace efftune
