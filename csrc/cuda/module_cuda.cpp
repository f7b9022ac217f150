// revkernels._C_cuda: loading it registers the CUDA kernels; it answers what it was built with.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "couple.h"

namespace py = pybind11;

namespace {

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
#if defined(REVKERNELS_FLAGS)
  info["flags"] = REVKERNELS_FLAGS;
#endif
  info["cuda"] = version(CUDART_VERSION);
#if defined(REVKERNELS_CUDA_ARCHS)
  info["architectures"] = REVKERNELS_CUDA_ARCHS;
#endif
  info["stable_abi_target"] = std::to_string(int(TORCH_TARGET_VERSION >> 56 & 0xff)) + "." +
                              std::to_string(int(TORCH_TARGET_VERSION >> 48 & 0xff));
#if defined(REVKERNELS_TORCH_VERSION)
  info["built_against_torch"] = REVKERNELS_TORCH_VERSION;
#endif
  return info;
}

void register_couple(py::object observed) {
  static const auto* const kept = new py::object(observed);  // also while Python ends
  revkernels::cuda::register_couple([] {
    const py::gil_scoped_acquire gil;
    return (*kept)().cast<bool>();
  });
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of revkernels; importing it registers them with torch.";
  m.def("build_info", &build_info,
        "Compiler, flags, CUDA version, architectures and targets of this build.");
  m.def("register_couple", &register_couple,
        "Serve couple_ on CUDA. observed(): whether Triton's launches are watched.");
  m.def("remembered_launches", &revkernels::cuda::remembered_launches,
        "How many launches of couple_ are known.");
}
