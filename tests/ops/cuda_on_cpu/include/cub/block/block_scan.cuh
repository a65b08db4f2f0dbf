// In place of CUB's: what the threads before a thread have, summed up.
#pragma once

#include "cuda_on_cpu.h"

namespace cub {

template <class T, int kThreads>
struct BlockScan {
    struct TempStorage {
        T of[kThreads];
    };

    TempStorage& storage;

    explicit BlockScan(TempStorage& storage) : storage(storage) {}

    void ExclusiveSum(T mine, T& before) {
        storage.of[threadIdx.x] = mine;
        __syncthreads();
        before = 0;
        for (unsigned t = 0; t < threadIdx.x; ++t) before += storage.of[t];
    }
};

}  // namespace cub
