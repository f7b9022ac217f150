// From torch's tensors to the kernels' arguments, with the checks that keep memory safe.
//
// Maps are read with their own strides, never copied. Weights, scale and shift are copied (they are
// small) where they are not contiguous or have a dtype other than the maps' or that of the sums.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../storage.h"
#include "kernels.h"

namespace revkernels::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, ": dtype ", torch::headeronly::toString(t.scalar_type()),
                  " is not supported; use float32, float64, float16 or bfloat16");
}

inline ScalarType sum_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_plane(const char* name, int64_t h, int64_t w) {
  STD_TORCH_CHECK(h == 0 || w <= std::numeric_limits<int32_t>::max() / h, name,
                  ": expected less than 2^31 pixels in a map, got ", h, " x ", w);
}

inline Map map_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected [N, C, H, W], got ", shape_of(t));
  check_plane(name, t.size(2), t.size(3));
  check_storage(t, name);
  return {t.const_data_ptr(), t.size(0),   t.size(1),   t.size(2),  t.size(3),
          t.stride(0),        t.stride(1), t.stride(2), t.stride(3)};
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name,
                  ": expected a tensor on CUDA device ", x.get_device_index());
}

// Contiguous, and in the sums' dtype unless it has x's own and `or_own` allows that.
inline Tensor small_tensor(const Tensor& t, const char* name, const Tensor& x, bool or_own) {
  check_same_device(t, name, x);
  check_storage(t, name);
  const ScalarType dtype = t.scalar_type();
  const bool keep = dtype == sum_dtype(x) || (or_own && dtype == x.scalar_type());
  const Tensor kept = keep ? t : torch::stable::to(t, sum_dtype(x));
  return kept.is_contiguous() ? kept : torch::stable::contiguous(kept);
}

// A vector or matrix in the sums' dtype, contiguous; itself if it already is that, else a copy.
inline Tensor dense(const Tensor& t, const char* name, const Tensor& x,
                    std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == int64_t(shape.size());
  for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == shape.begin()[d];
  STD_TORCH_CHECK(fits, name, ": expected ", text_of(shape), ", got ", shape_of(t));
  return small_tensor(t, name, x, false);
}

// Vectors of a prologue or a norm, kept alive while their kernel is launched; null where absent.
class Values {
 public:
  Values() = default;
  Values(const std::optional<Tensor>& t, const char* name, const Tensor& x,
         std::initializer_list<int64_t> shape) {
    if (t.has_value()) kept_ = dense(*t, name, x, shape);
  }
  const void* data() const { return kept_.has_value() ? kept_->const_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> kept_;
};

inline Activation activation_of(const std::string& act) {
  if (act == "hardswish") return Activation::hardswish;
  STD_TORCH_CHECK(act == "identity", "act: expected 'hardswish' or 'identity', got '", act, "'");
  return Activation::identity;
}

inline void check_shape(const Map& m, const Tensor& t, const char* name, int64_t n, int64_t c,
                        int64_t h, int64_t w) {
  STD_TORCH_CHECK(m.n == n && m.c == c && m.h == h && m.w == w, name, ": expected [", n, ", ", c,
                  ", ", h, ", ", w, "], got ", shape_of(t));
}

// Distinct indices must be distinct elements: every stride exceeds the extent of the smaller ones.
inline void check_distinct(const Map& m, const char* name) {
  std::array<std::pair<int64_t, int64_t>, 4> dims = {
      {{m.stride_n, m.n}, {m.stride_c, m.c}, {m.stride_h, m.h}, {m.stride_w, m.w}}};
  std::sort(dims.begin(), dims.end());
  int64_t extent = 0;
  for (const auto& [stride, size] : dims) {
    if (size <= 1) continue;
    STD_TORCH_CHECK(stride > extent, name,
                    ": elements overlap in memory; pass a tensor of its own");
    extent += stride * (size - 1);
  }
}

// Makes x's device current, and gives its current stream to the launches of f.
template <class F>
void run(const Tensor& x, const F& f) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  f(stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty(like, shape);
}

inline Tensor new_sums(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty(like, shape, sum_dtype(like));
}

// A new contiguous map as a kernel writes it.
inline Output output_of(const Tensor& t) {
  return {t.mutable_data_ptr(), t.size(1) * t.size(2) * t.size(3), t.size(2) * t.size(3)};
}

}  // namespace revkernels::cuda
