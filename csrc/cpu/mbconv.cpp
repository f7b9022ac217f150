// The three ops of an MBConv on the CPU.
#include "../mbconv_ops.h"
#include "mbconv_backend.h"

namespace revkernels {

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) {
  m.impl("mbconv", TORCH_BOX(&mbconv_op<CpuBackend>));
  m.impl("mbconv_recompute", TORCH_BOX(&mbconv_recompute_op<CpuBackend>));
  m.impl("mbconv_backward", TORCH_BOX(&mbconv_backward_op<CpuBackend>));
}

}  // namespace revkernels
