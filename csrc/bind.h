// What the two Python modules share: data pointers come as integers, sizes in elements, no tensors. The callers in
// efftune/ops check devices, shapes and strides.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

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

}  // namespace efftune
