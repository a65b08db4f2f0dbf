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

void bind_pack_act(uintptr_t x, uintptr_t codes, uintptr_t stats, int64_t rows, int64_t cols, int64_t stride,
                   int64_t group, int bits, const std::string& dtype, bool stochastic, uint64_t seed, uint32_t stream,
                   int threads) {
    check(rows >= 0 && cols >= 0 && threads > 0, "pack_act takes sizes of at least 0 and at least one thread.");
    check(group > 0 && (bits == 8 || (bits == 4 && group % 2 == 0)),
          "pack_act takes 8 bits in groups of at least 1, or 4 bits in even groups.");
    const PackArgs args{pointer<const void>(x),
                        pointer<uint8_t>(codes),
                        pointer<uint16_t>(stats),
                        rows,
                        cols,
                        stride,
                        group,
                        bits,
                        dtype_from(dtype),
                        stochastic,
                        seed,
                        stream};
    py::gil_scoped_release release;
    pack_act(args, threads);
}

void bind_unpack_act(uintptr_t codes, uintptr_t stats, uintptr_t out, int64_t rows, int64_t cols, int64_t group,
                     int bits, const std::string& dtype, int threads) {
    check(rows >= 0 && cols >= 0 && threads > 0, "unpack_act takes sizes of at least 0 and at least one thread.");
    check(group > 0 && (bits == 8 || (bits == 4 && group % 2 == 0)),
          "unpack_act takes 8 bits in groups of at least 1, or 4 bits in even groups.");
    const UnpackArgs args{pointer<const uint8_t>(codes),
                          pointer<const uint16_t>(stats),
                          pointer<void>(out),
                          rows,
                          cols,
                          group,
                          bits,
                          dtype_from(dtype)};
    py::gil_scoped_release release;
    unpack_act(args, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "efftune's C++ kernels for the CPU; call them through efftune.ops.";
    m.def("limit_isa", [](int limit) { isa_limit = limit; });
    m.def("perturb", &bind_perturb);
    m.def("dropout", &bind_dropout);
    m.def("int8_dequantize", &bind_int8);
    m.def("pack_act", &bind_pack_act);
    m.def("unpack_act", &bind_unpack_act);
}
