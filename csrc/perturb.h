// What perturb.cpp and perturb.cu share.
#pragma once

#include <vector>

#include "register.h"

namespace efftune {

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

// What differs between the tensors of perturb_many. The rest is in its PerturbArgs, whose offset is 0.
struct PerturbTensor {
    const void* w;
    void* out;  // may be w
    int64_t count;
    uint32_t stream;
    float threshold;
};

inline std::vector<PerturbTensor> read_tensors(Call& call) {
    std::vector<uintptr_t> w, out;
    std::vector<int64_t> counts;
    std::vector<uint32_t> streams;
    std::vector<float> thresholds;
    call.read(w, out, counts, streams, thresholds);
    const size_t size = w.size();
    call.check(out.size() == size && counts.size() == size && streams.size() == size && thresholds.size() == size,
               "perturb_many takes an out, a count, a stream and a threshold for each tensor.");
    std::vector<PerturbTensor> tensors;
    tensors.reserve(size);
    for (size_t i = 0; i < size; ++i) {
        call.check(counts[i] >= 0, "perturb_many takes counts of at least 0.");
        tensors.push_back({reinterpret_cast<const void*>(w[i]), reinterpret_cast<void*>(out[i]), counts[i], streams[i],
                           thresholds[i]});
    }
    return tensors;
}

}  // namespace efftune
