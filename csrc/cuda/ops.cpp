// The CUDA ops: checks, allocation, device and stream; the kernels are behind kernels.h.
//
// Maps are read with their own strides, never copied. Weights, scale and shift are copied (they are
// small) where they are not contiguous or have a dtype other than the maps' or that of the sums.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "../storage.h"
#include "kernels.h"

namespace revkernels {
namespace {

using cuda::Affine;
using cuda::Dtype;
using cuda::Filter;
using cuda::Map;
using cuda::Stream;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& t, const char* name) {
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

ScalarType sum_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_plane(const char* name, int64_t h, int64_t w) {
  STD_TORCH_CHECK(h == 0 || w <= std::numeric_limits<int32_t>::max() / h, name,
                  ": expected less than 2^31 pixels in a map, got ", h, " x ", w);
}

Map map_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected [N, C, H, W], got ", shape_of(t));
  check_plane(name, t.size(2), t.size(3));
  check_storage(t, name);
  return {t.const_data_ptr(), t.size(0),   t.size(1),   t.size(2),  t.size(3),
          t.stride(0),        t.stride(1), t.stride(2), t.stride(3)};
}

void check_same_device(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name,
                  ": expected a tensor on CUDA device ", x.get_device_index());
}

// Contiguous, and in `dtype` unless it has x's dtype and `or_own` allows that.
Tensor small_tensor(const Tensor& t, const char* name, const Tensor& x, bool or_own) {
  check_same_device(t, name, x);
  check_storage(t, name);
  const ScalarType dtype = t.scalar_type();
  const bool keep = dtype == sum_dtype(x) || (or_own && dtype == x.scalar_type());
  return torch::stable::contiguous(keep ? t : torch::stable::to(t, sum_dtype(x)));
}

Tensor weight_of(const Tensor& weight, const Tensor& x, int64_t channels) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1 &&
                      weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
                  "weight: expected [C, 1, k, k] with C = ", channels, " and k odd, got ",
                  shape_of(weight));
  return small_tensor(weight, "weight", x, true);
}

Filter filter_of(const Tensor& weight, const Tensor& x, int64_t stride) {
  STD_TORCH_CHECK(stride >= 1, "stride: expected at least 1, got ", stride);
  return {weight.const_data_ptr(), weight.scalar_type() != x.scalar_type(), weight.size(2), stride};
}

// The prologue's vectors, kept alive while their kernel is launched.
struct Vectors {
  std::optional<Tensor> scale, shift;

  Vectors(const std::optional<Tensor>& a, const std::optional<Tensor>& b, const Tensor& x,
          int64_t channels) {
    STD_TORCH_CHECK(a.has_value() == b.has_value(), "scale, shift: give both or neither");
    if (!a.has_value()) return;
    scale = vector(*a, "scale", x, channels);
    shift = vector(*b, "shift", x, channels);
  }

  static Tensor vector(const Tensor& t, const char* name, const Tensor& x, int64_t channels) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, name,
                    ": expected [C] with C = ", channels, ", got ", shape_of(t));
    return small_tensor(t, name, x, false);
  }

  Affine pointers() const {
    if (!scale.has_value()) return {nullptr, nullptr};
    return {scale->const_data_ptr(), shift->const_data_ptr()};
  }
};

Upsampling upsampling_of(const std::string& mode) {
  if (mode == "bilinear") return Upsampling::bilinear;
  STD_TORCH_CHECK(mode == "nearest", "mode: expected 'bilinear' or 'nearest', got '", mode, "'");
  return Upsampling::nearest;
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

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape);
}

// --- resampling -------------------------------------------------------------------------------

Tensor upsample(const Tensor& x, int64_t factor, std::string mode) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  const Upsampling upsampling = upsampling_of(mode);
  STD_TORCH_CHECK(factor >= 1, "factor: expected at least 1, got ", factor);
  check_plane("x, upsampled", in.h * factor, in.w * factor);
  Tensor y = new_tensor(x, {in.n, in.c, in.h * factor, in.w * factor});
  if (y.numel() == 0) return y;
  run(x, [&](Stream stream) {
    cuda::upsample(dtype, in, y.mutable_data_ptr(), factor, upsampling, stream);
  });
  return y;
}

Tensor upsample_adjoint(const Tensor& dy, int64_t factor, std::string mode) {
  const Map in = map_of(dy, "dy");
  const Dtype dtype = dtype_of(dy, "dy");
  const Upsampling upsampling = upsampling_of(mode);
  STD_TORCH_CHECK(factor >= 1 && in.h % factor == 0 && in.w % factor == 0,
                  "factor: expected a divisor of dy's height and width, got ", factor, " for ",
                  shape_of(dy));
  Tensor dx = new_tensor(dy, {in.n, in.c, in.h / factor, in.w / factor});
  if (dx.numel() == 0) return dx;
  run(dy, [&](Stream stream) {
    cuda::upsample_adjoint(dtype, in, dx.mutable_data_ptr(), factor, upsampling, stream);
  });
  return dx;
}

void check_sample(const char* name, int64_t c, int64_t h, int64_t w) {
  STD_TORCH_CHECK(h * w == 0 || c <= std::numeric_limits<int32_t>::max() / (h * w), name,
                  ": expected less than 2^31 values in a sample, got ", c, " x ", h, " x ", w);
}

Tensor space_to_depth(const Tensor& x, int64_t planes, int64_t block) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(block >= 1 && in.h % block == 0 && in.w % block == 0,
                  "block: expected a divisor of x's height and width, got ", block, " for ",
                  shape_of(x));
  STD_TORCH_CHECK(planes >= in.c && in.c > 0, "planes: expected at least C = ", in.c,
                  " and C > 0, got ", planes);
  check_sample("x, repeated", planes, in.h, in.w);
  Tensor y = new_tensor(x, {in.n, planes * block * block, in.h / block, in.w / block});
  if (y.numel() == 0) return y;
  run(x, [&](Stream stream) {
    cuda::space_to_depth(dtype, in, y.mutable_data_ptr(), planes, block, stream);
  });
  return y;
}

Tensor to_image(const Tensor& y, const char* name, int64_t channels, int64_t block,
                bool sum_copies) {
  const Map in = map_of(y, name);
  const Dtype dtype = dtype_of(y, name);
  STD_TORCH_CHECK(block >= 1 && in.c % (block * block) == 0, name,
                  ": expected a multiple of block^2 = ", block * block, " channels, got ",
                  shape_of(y));
  const int64_t planes = in.c / (block * block);
  STD_TORCH_CHECK(channels >= 1 && channels <= planes, "channels: expected 1 to ", planes, ", got ",
                  channels);
  check_sample(name, in.c, in.h, in.w);
  Tensor x = new_tensor(y, {in.n, channels, in.h * block, in.w * block});
  if (x.numel() == 0) return x;
  run(y, [&](Stream stream) {
    cuda::depth_to_space(dtype, in, x.mutable_data_ptr(), channels, block, sum_copies, stream);
  });
  return x;
}

Tensor depth_to_space(const Tensor& y, int64_t channels, int64_t block) {
  return to_image(y, "y", channels, block, false);
}

Tensor space_to_depth_adjoint(const Tensor& dy, int64_t channels, int64_t block) {
  return to_image(dy, "dy", channels, block, true);
}

// --- depthwise convolution --------------------------------------------------------------------

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, std::optional<Tensor> scale,
                      std::optional<Tensor> shift, int64_t stride) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  const Tensor w = weight_of(weight, x, in.c);
  const Filter filter = filter_of(w, x, stride);
  const Vectors vectors(scale, shift, x, in.c);
  Tensor y = new_tensor(
      x, {in.n, in.c, depthwise_out_size(in.h, stride), depthwise_out_size(in.w, stride)});
  if (y.numel() == 0) return y;
  run(x, [&](Stream stream) {
    cuda::depthwise_conv(dtype, in, filter, vectors.pointers(), y.mutable_data_ptr(), stream);
  });
  return y;
}

void check_out_size(const Map& dy, int64_t height, int64_t width, int64_t stride) {
  const int64_t h = depthwise_out_size(height, stride), w = depthwise_out_size(width, stride);
  STD_TORCH_CHECK(dy.h == h && dy.w == w, "dy: expected ", h, " x ", w, " pixels, got ", dy.h,
                  " x ", dy.w);
}

Tensor depthwise_conv_grad_input(const Tensor& dy, const Tensor& weight, int64_t height,
                                 int64_t width, int64_t stride) {
  const Map in = map_of(dy, "dy");
  const Dtype dtype = dtype_of(dy, "dy");
  const Tensor w = weight_of(weight, dy, in.c);
  const Filter filter = filter_of(w, dy, stride);
  check_out_size(in, height, width, stride);
  check_plane("height, width", height, width);
  Tensor dx = new_tensor(dy, {in.n, in.c, height, width});
  if (dx.numel() == 0) return dx;
  run(dy, [&](Stream stream) {
    cuda::depthwise_conv_grad_input(dtype, in, filter, dx.mutable_data_ptr(), height, width,
                                    stream);
  });
  return dx;
}

Tensor depthwise_conv_grad_weight(const Tensor& x, const Tensor& dy, std::optional<Tensor> scale,
                                  std::optional<Tensor> shift, int64_t kernel, int64_t stride) {
  STD_TORCH_CHECK(kernel >= 1 && kernel % 2 == 1, "kernel: expected an odd size, got ", kernel);
  STD_TORCH_CHECK(stride >= 1, "stride: expected at least 1, got ", stride);
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  check_same_device(dy, "dy", x);
  dtype_of(dy, "dy");
  check_storage(dy, "dy");
  // Mixed dtypes do not occur in training, and are not worth kernels of their own.
  const Tensor grad =
      dy.scalar_type() == x.scalar_type() ? dy : torch::stable::to(dy, x.scalar_type());
  const Map g = map_of(grad, "dy");
  STD_TORCH_CHECK(g.n == in.n && g.c == in.c, "dy: expected x's N and C, got ", shape_of(dy),
                  " for ", shape_of(x));
  check_out_size(g, in.h, in.w, stride);
  const Vectors vectors(scale, shift, x, in.c);
  Tensor dw = torch::stable::new_empty(x, {in.c, 1, kernel, kernel}, sum_dtype(x));
  if (x.numel() == 0) {
    torch::stable::zero_(dw);
    return dw;
  }
  const int64_t slices = cuda::grad_weight_slices(dtype, g, kernel, stride);
  const Tensor partial =
      slices == 1 ? dw : torch::stable::new_empty(x, {slices, in.c, kernel, kernel}, sum_dtype(x));
  run(x, [&](Stream stream) {
    cuda::depthwise_conv_grad_weight(dtype, in, g, vectors.pointers(), kernel, stride,
                                     partial.mutable_data_ptr(), dw.mutable_data_ptr(), stream);
  });
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(revkernels, CUDA, m) {
  m.impl("upsample", TORCH_BOX(&upsample));
  m.impl("upsample_adjoint", TORCH_BOX(&upsample_adjoint));
  m.impl("space_to_depth", TORCH_BOX(&space_to_depth));
  m.impl("depth_to_space", TORCH_BOX(&depth_to_space));
  m.impl("space_to_depth_adjoint", TORCH_BOX(&space_to_depth_adjoint));
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("depthwise_conv_grad_input", TORCH_BOX(&depthwise_conv_grad_input));
  m.impl("depthwise_conv_grad_weight", TORCH_BOX(&depthwise_conv_grad_weight));
}

}  // namespace revkernels
