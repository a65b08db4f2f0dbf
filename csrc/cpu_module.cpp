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

void bind_row_norms(uintptr_t x, int64_t stride, uintptr_t out, int64_t rows, int64_t cols, const std::string& dtype,
                    int threads) {
    check(rows >= 0 && cols >= 0 && threads > 0, "row_norms takes sizes of at least 0 and at least one thread.");
    const RowNormsArgs args{pointer<const void>(x), stride, pointer<float>(out), rows, cols, dtype_from(dtype)};
    py::gil_scoped_release release;
    row_norms(args, threads);
}

void bind_select_rows(uintptr_t scores, int64_t rows, int64_t kept, uint64_t seed, uint32_t stream, int sampler,
                      uintptr_t idx, uintptr_t weight, uintptr_t fallback, uintptr_t /* a GPU's stream */) {
    check(rows >= 0 && rows < (int64_t{1} << 31) && kept > 0 && sampler >= 0 && sampler <= 3,
          "select_rows takes fewer than 2^31 rows and keeps at least one.");
    const SelectRowsArgs args{pointer<const float>(scores),
                              rows,
                              kept,
                              seed,
                              stream,
                              static_cast<Sampler>(sampler),
                              pointer<int64_t>(idx),
                              pointer<float>(weight),
                              pointer<int32_t>(fallback)};
    py::gil_scoped_release release;
    select_rows(args);
}

void check_index(const int64_t* idx, int64_t count, int64_t rows) {
    for (int64_t s = 0; s < count; ++s) {
        if (idx[s] >= 0 && idx[s] < rows) continue;
        throw py::index_error("Row " + std::to_string(idx[s]) + " is outside of a matrix with " + std::to_string(rows) +
                              " rows; idx must come from the same number of rows.");
    }
}

void bind_gather_rows(uintptr_t x, uintptr_t idx, uintptr_t out, int64_t rows, int64_t cols, int64_t stride,
                      int64_t kept, int itemsize, int threads) {
    check_index(pointer<const int64_t>(idx), kept, rows);
    const GatherRowsArgs args{
        pointer<const void>(x), pointer<const int64_t>(idx), pointer<void>(out), cols, stride, kept, itemsize};
    py::gil_scoped_release release;
    gather_rows(args, threads);
}

void bind_scale_rows(uintptr_t g, uintptr_t idx, uintptr_t weight, uintptr_t out, int64_t rows, int64_t cols,
                     int64_t stride, int64_t kept, bool transposed, const std::string& dtype, int threads) {
    check_index(pointer<const int64_t>(idx), kept, rows);
    const ScaleRowsArgs args{pointer<const void>(g),
                             pointer<const int64_t>(idx),
                             pointer<const float>(weight),
                             pointer<void>(out),
                             cols,
                             stride,
                             kept,
                             transposed,
                             dtype_from(dtype)};
    py::gil_scoped_release release;
    scale_rows(args, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "efftune's C++ kernels for the CPU; call them through efftune.ops.";
    m.def("limit_isa", [](int limit) { isa_limit = limit; });
    m.def("perturb", &bind_perturb);
    m.def("dropout", &bind_dropout);
    m.def("int8_dequantize", &bind_int8);
    m.def("row_norms", &bind_row_norms);
    m.def("select_rows", &bind_select_rows);
    m.def("gather_rows", &bind_gather_rows);
    m.def("scale_rows", &bind_scale_rows);
}
