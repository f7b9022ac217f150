// The three ops of an MBConv on CUDA.
#include <exception>

#include "../mbconv_ops.h"
#include "mbconv_backend.h"
#include "torch_device.h"

namespace revkernels {
namespace {

class CudaBackend : public CudaSteps<cuda::TorchDevice> {
 public:
  using Tensor = torch::stable::Tensor;

  static constexpr const char* kDevice = "CUDA";
  static bool is_here(const Tensor& t) { return t.is_cuda(); }

  CudaBackend(const Tensor& like, DType sums) : CudaSteps(sums, like) {}
  ~CudaBackend() noexcept(false) {
    if (std::uncaught_exceptions() == 0) STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

STABLE_TORCH_LIBRARY_IMPL(revkernels, CUDA, m) {
  m.impl("mbconv", TORCH_BOX(&mbconv_op<CudaBackend>));
  m.impl("mbconv_recompute", TORCH_BOX(&mbconv_recompute_op<CudaBackend>));
  m.impl("mbconv_backward", TORCH_BOX(&mbconv_backward_op<CudaBackend>));
}

}  // namespace
}  // namespace revkernels
