// The Python face of the CUDA kernels. The stream is torch's current one, as an integer; the caller sets the device.
#include "bind.h"

namespace py = pybind11;
using namespace efftune;

namespace {

void bind_perturb(uintptr_t w, uintptr_t out, int64_t count, const std::string& dtype, float a, uint64_t seed,
                  uint32_t stream, uint64_t offset, bool sign, bool stochastic, uintptr_t cuda_stream) {
    check(count >= 0, "perturb takes a count of at least 0.");
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
    const char* error = perturb_cuda(args, pointer<void>(cuda_stream));
    if (error != nullptr) throw std::runtime_error(std::string("perturb did not start: ") + error);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "efftune's CUDA kernels; call them through efftune.ops.";
    m.def("perturb", &bind_perturb);
}
