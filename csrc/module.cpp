// revkernels._C: loading it registers the CPU kernels; it answers what it was built with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdio>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

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
#if defined(REVK_X86_MULTIVERSION)
  info["instruction_sets"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  info["instruction_sets"] = std::vector<std::string>{"baseline"};
#endif
  info["instruction_set_in_use"] = revkernels::kernels().name;
  char target[32];
  snprintf(target, sizeof(target), "%d.%d", int(TORCH_TARGET_VERSION >> 56 & 0xff),
           int(TORCH_TARGET_VERSION >> 48 & 0xff));
  info["stable_abi_target"] = target;
#if defined(REVKERNELS_TORCH_VERSION)
  info["built_against_torch"] = REVKERNELS_TORCH_VERSION;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  revkernels::kernels();  // an instruction set that cannot be used fails here, not in the first op
  m.doc() = "CPU kernels of revkernels; importing it registers them with torch.";
  m.def("build_info", &build_info, "Compiler, flags, instruction sets and targets of this build.");
}
