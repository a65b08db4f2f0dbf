// What the two Python modules share: data pointers come as integers, sizes in elements, no tensors. The callers in
// efftune/ops check devices, shapes and strides.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace efftune {

inline Dtype dtype_from(const std::string& name) {
    if (name == "float32") return Dtype::kFloat32;
    if (name == "bfloat16") return Dtype::kBFloat16;
    if (name == "float16") return Dtype::kFloat16;
    throw std::invalid_argument("The compiled kernels take float32, bfloat16 or float16, not " + name + ".");
}

inline void check(bool ok, const char* sentence) {
    if (!ok) throw std::invalid_argument(sentence);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline std::vector<PerturbTensor> perturb_tensors(const std::vector<uintptr_t>& w, const std::vector<uintptr_t>& out,
                                                  const std::vector<int64_t>& counts,
                                                  const std::vector<uint32_t>& streams,
                                                  const std::vector<float>& thresholds) {
    const size_t size = w.size();
    check(out.size() == size && counts.size() == size && streams.size() == size && thresholds.size() == size,
          "perturb_many takes an out, a count, a stream and a threshold for each tensor.");
    std::vector<PerturbTensor> tensors;
    tensors.reserve(size);
    for (size_t i = 0; i < size; ++i) {
        check(counts[i] >= 0, "perturb_many takes counts of at least 0.");
        tensors.push_back({pointer<const void>(w[i]), pointer<void>(out[i]), counts[i], streams[i], thresholds[i]});
    }
    return tensors;
}

}  // namespace efftune
