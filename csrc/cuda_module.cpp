// The Python face of the CUDA kernels. The stream is torch's current one, as an integer; the caller sets the device.
#include <pybind11/stl.h>

#include "bind.h"

namespace py = pybind11;
using namespace efftune;

namespace {

void bind_perturb(uintptr_t w, uintptr_t out, int64_t count, const std::string& dtype, uintptr_t a, uintptr_t seeds,
                  uint64_t seed, int64_t draws, uint32_t stream, uint64_t offset, bool sign, bool stochastic,
                  float threshold, uintptr_t cuda_stream) {
    check(count >= 0 && draws >= 0, "perturb takes a count of at least 0.");
    const PerturbArgs args{pointer<const void>(w),
                           pointer<void>(out),
                           count,
                           dtype_from(dtype),
                           pointer<const float>(a),
                           pointer<const uint64_t>(seeds),
                           seed,
                           draws,
                           stream,
                           offset,
                           sign,
                           stochastic,
                           threshold};
    const char* error = perturb_cuda(args, pointer<void>(cuda_stream));
    if (error != nullptr) throw std::runtime_error(std::string("perturb did not start: ") + error);
}

void bind_perturb_many(const std::vector<uintptr_t>& w, const std::vector<uintptr_t>& out,
                       const std::vector<int64_t>& counts, const std::vector<uint32_t>& streams,
                       const std::vector<float>& thresholds, const std::string& dtype, uintptr_t a, uintptr_t seeds,
                       uint64_t seed, int64_t draws, bool sign, bool stochastic, uintptr_t cuda_stream) {
    check(draws >= 0, "perturb_many takes a number of draws of at least 0.");
    const std::vector<PerturbTensor> tensors = perturb_tensors(w, out, counts, streams, thresholds);
    PerturbArgs args{};
    args.dtype = dtype_from(dtype);
    args.a = pointer<const float>(a);
    args.seeds = pointer<const uint64_t>(seeds);
    args.seed = seed;
    args.draws = draws;
    args.sign = sign;
    args.stochastic = stochastic;
    const char* error =
        perturb_many_cuda(args, tensors.data(), static_cast<int64_t>(tensors.size()), pointer<void>(cuda_stream));
    if (error != nullptr) throw std::runtime_error(std::string("perturb_many did not start: ") + error);
}

void bind_select_rows(uintptr_t scores, int64_t rows, int64_t kept, uint64_t seed, uint32_t stream, int sampler,
                      uintptr_t idx, uintptr_t weight, uintptr_t fallback, uintptr_t cuda_stream) {
    check(rows >= 0 && (rows <= kMaxCudaRows || rows <= kept) && kept > 0 && sampler == 0,
          "select_rows on a GPU draws systematically, keeps at least one row and takes no more than one block sorts.");
    const SelectRowsArgs args{pointer<const float>(scores),
                              rows,
                              kept,
                              seed,
                              stream,
                              Sampler::kSystematic,
                              pointer<int64_t>(idx),
                              pointer<float>(weight),
                              pointer<int32_t>(fallback)};
    const char* error = select_rows_cuda(args, pointer<void>(cuda_stream));
    if (error != nullptr) throw std::runtime_error(std::string("select_rows did not start: ") + error);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "efftune's CUDA kernels; call them through efftune.ops.";
    m.def("perturb", &bind_perturb);
    m.def("perturb_many", &bind_perturb_many);
    m.def("select_rows", &bind_select_rows);
}
