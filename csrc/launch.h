// The two things of CUDA that a C++ compiler cannot read, a launch and dynamic shared memory, as functions. So the .cu
// files are C++ but for names, which cuda_on_cpu.h has: tests/ops/cuda_on_cpu runs them on a machine without a GPU.
#pragma once

#ifdef __CUDACC__

namespace efftune {

// The dynamic shared memory of the block.
template <class T>
__device__ T& shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return *reinterpret_cast<T*>(memory);
}

template <class... P, class... A>
cudaError_t launch_kernel(void (*kernel)(P...), int grid, int threads, size_t shared, cudaStream_t stream, A... args) {
    kernel<<<grid, threads, shared, stream>>>(args...);
    return cudaGetLastError();
}

}  // namespace efftune

#else
#include "cuda_on_cpu.h"
#endif
