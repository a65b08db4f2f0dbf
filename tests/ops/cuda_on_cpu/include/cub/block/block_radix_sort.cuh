// In place of CUB's: keys in ascending order over the block, equal ones as they came, each thread with kEach of them.
#pragma once

#include "cuda_on_cpu.h"

namespace cub {

template <class K, int kThreads, int kEach, class V>
struct BlockRadixSort {
    struct TempStorage {
        V values[kThreads * kEach];  // first, where other uses of the memory would write
        K keys[kThreads * kEach];
    };

    TempStorage& storage;

    explicit BlockRadixSort(TempStorage& storage) : storage(storage) {}

    void Sort(K (&keys)[kEach], V (&values)[kEach]) {
        const unsigned first = threadIdx.x * kEach;
        std::copy(keys, keys + kEach, storage.keys + first);
        std::copy(values, values + kEach, storage.values + first);
        __syncthreads();
        if (threadIdx.x == 0) {
            std::vector<std::pair<K, V>> pairs(kThreads * kEach);
            for (int i = 0; i < kThreads * kEach; ++i) pairs[i] = {storage.keys[i], storage.values[i]};
            std::stable_sort(pairs.begin(), pairs.end(), [](auto& a, auto& b) { return a.first < b.first; });
            for (int i = 0; i < kThreads * kEach; ++i) {
                storage.keys[i] = pairs[i].first;
                storage.values[i] = pairs[i].second;
            }
        }
        __syncthreads();
        std::copy(storage.keys + first, storage.keys + first + kEach, keys);
        std::copy(storage.values + first, storage.values + first + kEach, values);
    }
};

}  // namespace cub
