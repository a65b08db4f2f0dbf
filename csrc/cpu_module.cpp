// The Python face of the C++ kernels.
#include "bind.h"

namespace py = pybind11;
using namespace efftune;

namespace {

void bind_perturb(uintptr_t w, uintptr_t out, int64_t count, const std::string& dtype, float a, uint64_t seed,
                  uint32_t stream, uint64_t offset, bool sign, bool stochastic, int threads) {
    check(count >= 0 && threads > 0, "perturb takes a count of at least 0 and at least one thread.");
    const PerturbArgs args{pointer<const void>(w),
                           pointer<void>(out),
                           count,
                           dtype_from(dtype),
                           a,
                           seed,
                           stream,
                           offset,
                           sign,
                           stochastic};
    py::gil_scoped_release release;
    perturb(args, threads);
}

void bind_dropout(uintptr_t x, uintptr_t out, int64_t count, const std::string& dtype, uint32_t threshold, float scale,
                  uint64_t seed, uint32_t stream, int threads) {
    check(count >= 0 && threads > 0, "dropout takes a count of at least 0 and at least one thread.");
    const DropoutArgs args{
        pointer<const void>(x), pointer<void>(out), count, dtype_from(dtype), threshold, scale, seed, stream};
    py::gil_scoped_release release;
    dropout(args, threads);
}

void bind_int8(uintptr_t codes, uintptr_t scales, uintptr_t out, int64_t rows, int64_t cols, int64_t group,
               const std::string& scale_dtype, const std::string& dtype, int threads) {
    check(rows >= 0 && cols >= 0 && group > 0 && threads > 0,
          "int8_dequantize takes sizes of at least 0, a group of at least 1 and at least one thread.");
    const Int8Args args{pointer<const int8_t>(codes),
                        pointer<const void>(scales),
                        pointer<void>(out),
                        rows,
                        cols,
                        group,
                        dtype_from(scale_dtype),
                        dtype_from(dtype)};
    py::gil_scoped_release release;
    int8_dequantize(args, threads);
}

void bind_linear_cross_entropy(uintptr_t z, uintptr_t bias, uintptr_t targets, uintptr_t norm, uintptr_t loss,
                               uintptr_t dy, int64_t rows, int64_t cols, int64_t first, int64_t vocabulary,
                               int64_t ignore_index, const std::string& dtype, float softcap, float smoothing,
                               bool gradient, int threads) {
    check(rows >= 0 && cols > 0 && first >= 0 && first + cols <= vocabulary && threads > 0,
          "linear_cross_entropy takes columns inside the vocabulary, at least one, and at least one thread.");
    const LinearCrossEntropyArgs args{pointer<void>(z),
                                      pointer<const float>(bias),
                                      pointer<const int64_t>(targets),
                                      pointer<float>(norm),
                                      pointer<float>(loss),
                                      pointer<const float>(dy),
                                      rows,
                                      cols,
                                      first,
                                      vocabulary,
                                      ignore_index,
                                      dtype_from(dtype),
                                      softcap,
                                      smoothing,
                                      gradient};
    py::gil_scoped_release release;
    linear_cross_entropy(args, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "efftune's C++ kernels for the CPU; call them through efftune.ops.";
    m.def("limit_isa", [](int limit) { isa_limit = limit; });
    m.def("perturb", &bind_perturb);
    m.def("dropout", &bind_dropout);
    m.def("int8_dequantize", &bind_int8);
    m.def("linear_cross_entropy", &bind_linear_cross_entropy);
}
