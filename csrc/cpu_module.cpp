// The Python face of the C++ kernels.
#include <pybind11/stl.h>

#include <algorithm>

#include "bind.h"

namespace py = pybind11;
using namespace efftune;

namespace {

void bind_perturb(uintptr_t w, uintptr_t out, int64_t count, const std::string& dtype, uintptr_t a,
                  const std::vector<uint64_t>& seeds, uint32_t stream, uint64_t offset, bool sign, bool stochastic,
                  float threshold, int threads) {
    check(count >= 0 && threads > 0, "perturb takes a count of at least 0 and at least one thread.");
    const PerturbArgs args{pointer<const void>(w),
                           pointer<void>(out),
                           count,
                           dtype_from(dtype),
                           pointer<const float>(a),
                           seeds.data(),
                           seeds.empty() ? 0 : seeds[0],
                           static_cast<int64_t>(seeds.size()),
                           stream,
                           offset,
                           sign,
                           stochastic,
                           threshold};
    py::gil_scoped_release release;
    perturb(args, threads);
}

void bind_perturb_many(const std::vector<uintptr_t>& w, const std::vector<uintptr_t>& out,
                       const std::vector<int64_t>& counts, const std::vector<uint32_t>& streams,
                       const std::vector<float>& thresholds, const std::string& dtype, uintptr_t a,
                       const std::vector<uint64_t>& seeds, bool sign, bool stochastic, int threads) {
    check(threads > 0, "perturb_many takes at least one thread.");
    const std::vector<PerturbTensor> tensors = perturb_tensors(w, out, counts, streams, thresholds);
    PerturbArgs args{};
    args.dtype = dtype_from(dtype);
    args.a = pointer<const float>(a);
    args.seeds = seeds.data();
    args.seed = seeds.empty() ? 0 : seeds[0];
    args.draws = static_cast<int64_t>(seeds.size());
    args.sign = sign;
    args.stochastic = stochastic;
    py::gil_scoped_release release;
    for (const PerturbTensor& t : tensors) {
        args.w = t.w, args.out = t.out, args.count = t.count, args.stream = t.stream, args.threshold = t.threshold;
        perturb(args, threads);
    }
}

float bind_draw(int64_t count, const std::vector<uint64_t>& seeds, uint32_t stream, bool sign, int threads) {
    check(count >= 0 && threads > 0, "draw takes a count of at least 0 and at least one thread.");
    PerturbArgs args{};
    args.count = count, args.seeds = seeds.data(), args.draws = static_cast<int64_t>(seeds.size());
    args.stream = stream, args.sign = sign;
    py::gil_scoped_release release;
    return draw(args, threads);
}

void bind_dropout(uintptr_t x, uintptr_t out, int64_t count, const std::string& dtype, uint32_t threshold, float scale,
                  uint64_t seed, uint32_t stream, int threads) {
    check(count >= 0 && threads > 0, "dropout takes a count of at least 0 and at least one thread.");
    const DropoutArgs args{
        pointer<const void>(x), pointer<void>(out), count, dtype_from(dtype), threshold, scale, seed, stream};
    py::gil_scoped_release release;
    dropout(args, threads);
}

void bind_relu(uintptr_t x, uintptr_t y, uintptr_t bits, int64_t count, const std::string& dtype, bool backward,
               int threads) {
    check(count >= 0 && threads > 0, "relu takes a count of at least 0 and at least one thread.");
    const ReluArgs args{pointer<const void>(x), pointer<void>(y), pointer<uint8_t>(bits), count,
                        dtype_from(dtype),      backward};
    py::gil_scoped_release release;
    relu(args, threads);
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

void bind_norm(uintptr_t x, uintptr_t y, uintptr_t gain, uintptr_t bias, uintptr_t mean, uintptr_t rstd, int64_t rows,
               int64_t cols, float eps, const std::string& dtype, bool saved, int threads) {
    check(rows >= 0 && cols > 0 && threads > 0, "rms_norm takes at least one column and at least one thread.");
    const NormArgs args{pointer<const void>(x),
                        pointer<void>(y),
                        pointer<const float>(gain),
                        pointer<const float>(bias),
                        pointer<float>(mean),
                        pointer<float>(rstd),
                        rows,
                        cols,
                        eps,
                        dtype_from(dtype)};
    py::gil_scoped_release release;
    norm(args, saved, threads);
}

void bind_norm_backward(uintptr_t dy, uintptr_t x, uintptr_t gain, uintptr_t mean, uintptr_t rstd, uintptr_t dx,
                        uintptr_t dweight, uintptr_t dbias, int64_t rows, int64_t cols, const std::string& dtype,
                        int threads) {
    check(rows >= 0 && cols > 0 && threads > 0, "rms_norm takes at least one column and at least one thread.");
    const NormBackwardArgs args{pointer<const void>(dy),
                                pointer<const void>(x),
                                pointer<const float>(gain),
                                pointer<const float>(mean),
                                pointer<const float>(rstd),
                                pointer<void>(dx),
                                pointer<float>(dweight),
                                pointer<float>(dbias),
                                rows,
                                cols,
                                dtype_from(dtype)};
    py::gil_scoped_release release;
    norm_backward(args, threads);
}

Activation activation_from(const std::string& name) {
    if (name == "silu") return Activation::kSilu;
    if (name == "gelu") return Activation::kGelu;
    if (name == "gelu_tanh") return Activation::kGeluTanh;
    if (name == "relu") return Activation::kRelu;
    if (name == "relu2") return Activation::kRelu2;
    throw std::invalid_argument("glu has no activation " + name + ".");
}

void bind_glu(uintptr_t gate, uintptr_t up, uintptr_t dy, uintptr_t y, uintptr_t dgate, uintptr_t dup, int64_t rows,
              int64_t cols, int64_t gate_stride, int64_t up_stride, int64_t dy_stride, const std::string& activation,
              const std::string& dtype, int threads) {
    check(rows >= 0 && cols >= 0 && threads > 0, "glu takes sizes of at least 0 and at least one thread.");
    const GluArgs args{pointer<const void>(gate),
                       pointer<const void>(up),
                       pointer<const void>(dy),
                       pointer<void>(y),
                       pointer<void>(dgate),
                       pointer<void>(dup),
                       rows,
                       cols,
                       gate_stride,
                       up_stride,
                       dy_stride,
                       activation_from(activation),
                       dtype_from(dtype)};
    py::gil_scoped_release release;
    glu(args, threads);
}

// Of a tensor (B, H, T, D): x, out, H, and the strides of B, H and T in x and in out.
using RotaryTensor = std::tuple<uintptr_t, uintptr_t, int64_t, std::array<int64_t, 3>, std::array<int64_t, 3>>;

RotaryHeads rotary_heads_of(const RotaryTensor& tensor) {
    const auto& [x, out, heads, x_stride, out_stride] = tensor;
    check(heads >= 0, "rotary takes sizes of at least 0.");
    return {pointer<const void>(x), pointer<void>(out), heads, x_stride, out_stride};
}

void bind_rotary(const RotaryTensor& x, const std::optional<RotaryTensor>& also, uintptr_t cos, uintptr_t sin,
                 int64_t batch, int64_t tokens, int64_t size, const std::array<int64_t, 2>& cos_stride,
                 const std::array<int64_t, 2>& sin_stride, const std::string& dtype, const std::string& table_dtype,
                 bool transposed, int threads) {
    check(batch >= 0 && tokens >= 0 && size >= 0 && size % 2 == 0 && threads > 0,
          "rotary takes sizes of at least 0, an even number of columns and at least one thread.");
    const RotaryArgs args{{rotary_heads_of(x), also ? rotary_heads_of(*also) : RotaryHeads{}},
                          pointer<const void>(cos),
                          pointer<const void>(sin),
                          batch,
                          tokens,
                          size,
                          cos_stride,
                          sin_stride,
                          dtype_from(dtype),
                          dtype_from(table_dtype),
                          transposed};
    py::gil_scoped_release release;
    rotary(args, threads);
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

void bind_linear_cross_entropy(uintptr_t z, uintptr_t bias, uintptr_t targets, uintptr_t norm, uintptr_t loss,
                               uintptr_t dy, int64_t rows, int64_t cols, int64_t first, int64_t vocabulary,
                               int64_t ignore_index, float softcap, float smoothing, bool gradient, int threads) {
    check(rows >= 0 && cols > 0 && first >= 0 && first + cols <= vocabulary && threads > 0,
          "linear_cross_entropy takes columns inside the vocabulary, at least one, and at least one thread.");
    const LinearCrossEntropyArgs args{pointer<float>(z),
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
                                      softcap,
                                      smoothing,
                                      gradient};
    py::gil_scoped_release release;
    linear_cross_entropy(args, threads);
}

const std::vector<std::string> kBf16Units = {"none", "avx512", "amx"};  // in the order of Bf16Unit

void bind_bf16_product(uintptr_t a, uintptr_t b, uintptr_t out, const std::array<int64_t, 3>& shape,
                       const std::array<int64_t, 3>& strides, const std::string& unit, int threads) {
    const auto [m, n, k] = shape;
    const auto index = std::find(kBf16Units.begin(), kBf16Units.end(), unit) - kBf16Units.begin();
    check(m >= 0 && n >= 0 && k >= 0 && threads > 0, "bf16_product takes sizes of at least 0 and at least one thread.");
    check(index <= static_cast<int>(bf16_unit()), "bf16_product takes a unit that this processor has, or 'none'.");
    const ProductArgs args{pointer<const uint16_t>(a),
                           pointer<const uint16_t>(b),
                           pointer<float>(out),
                           m,
                           n,
                           k,
                           strides[0],
                           strides[1],
                           strides[2]};
    py::gil_scoped_release release;
    bf16_product(args, static_cast<Bf16Unit>(index), threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "efftune's C++ kernels for the CPU; call them through efftune.ops.";
    m.def("limit_isa", [](int limit) { isa_limit = limit; });
    m.def("perturb", &bind_perturb);
    m.def("perturb_many", &bind_perturb_many);
    m.def("draw", &bind_draw);
    m.def("dropout", &bind_dropout);
    m.def("int8_dequantize", &bind_int8);
    m.def("relu", &bind_relu);
    m.def("pack_act", &bind_pack_act);
    m.def("unpack_act", &bind_unpack_act);
    m.def("norm", &bind_norm);
    m.def("norm_backward", &bind_norm_backward);
    m.def("glu", &bind_glu);
    m.def("rotary", &bind_rotary);
    m.def("row_norms", &bind_row_norms);
    m.def("select_rows", &bind_select_rows);
    m.def("gather_rows", &bind_gather_rows);
    m.def("scale_rows", &bind_scale_rows);
    m.def("linear_cross_entropy", &bind_linear_cross_entropy);
    m.def("bf16_unit", [] { return kBf16Units[static_cast<size_t>(bf16_unit())]; });
    m.def("bf16_product", &bind_bf16_product);
}
