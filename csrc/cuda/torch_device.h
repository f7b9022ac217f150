// A GPU as PyTorch has it: its allocator, its stream, and cuBLAS through its own ops.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "products.h"
#include "tensors.h"

namespace revkernels::cuda {

inline ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return ScalarType::Float;
    case Dtype::float64:
      return ScalarType::Double;
    case Dtype::float16:
      return ScalarType::Half;
    case Dtype::bfloat16:
      return ScalarType::BFloat16;
    case Dtype::int16:
      break;
  }
  return ScalarType::Short;
}

// Makes the device of `like` current while it lives.
class TorchDevice {
 public:
  class Memory {
   public:
    Memory() = default;
    explicit Memory(const Tensor& t) : tensor_(t) {}
    void* data() const { return tensor_.has_value() ? tensor_->mutable_data_ptr() : nullptr; }

   private:
    std::optional<Tensor> tensor_;
  };

  Stream stream = nullptr;

  explicit TorchDevice(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  }

  Memory allocate(int64_t bytes) const { return Memory(empty(like_, {bytes}, ScalarType::Byte)); }

  void multiply(Dtype dtype, Dtype out_dtype, const Matrices& out, const Matrices& a,
                const Matrices& b, bool add) const {
    const Tensor to = view(out, out_dtype), left = view(a, dtype), right = view(b, dtype);
    if (out_dtype != dtype) {
      std::array<StableIValue, 4> stack = {
          torch::stable::detail::from(left), torch::stable::detail::from(right),
          torch::stable::detail::from(scalar_type(out_dtype)), torch::stable::detail::from(to)};
      TORCH_ERROR_CODE_CHECK(
          torch_call_dispatcher("aten::bmm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
      torch::stable::detail::to<Tensor>(stack[0]);  // `to` again, to be released
    } else if (add) {
      TORCH_ERROR_CODE_CHECK(
          aoti_torch_cuda_baddbmm_out(to.get(), to.get(), left.get(), right.get(), 1.0, 1.0));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_bmm_out(to.get(), left.get(), right.get()));
    }
  }

 private:
  Tensor view(const Matrices& m, Dtype dtype) const {
    const std::array<int64_t, 3> sizes = {m.batch, m.rows, m.columns};
    const std::array<int64_t, 3> strides = {m.stride_b, m.stride_r, m.stride_c};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        const_cast<void*>(m.data), 3, sizes.data(), strides.data(), 0,
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type(dtype))),
        aoti_torch_device_type_cuda(), like_.get_device_index(), &handle));
    return Tensor(handle);
  }

  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace revkernels::cuda
