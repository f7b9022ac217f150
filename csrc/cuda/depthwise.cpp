// The depthwise convolution and its gradients: checks and allocation.
#include "tensors.h"

namespace revkernels {
namespace {

using namespace cuda;

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

// The prologue's scale and shift, both or neither.
struct Prologue {
  Values scale, shift;

  Prologue(const std::optional<Tensor>& a, const std::optional<Tensor>& b, const Tensor& x,
           int64_t channels)
      : scale(a, "scale", x, {channels}), shift(b, "shift", x, {channels}) {
    STD_TORCH_CHECK(a.has_value() == b.has_value(), "scale, shift: give both or neither");
  }
  Affine pointers() const { return {scale.data(), shift.data()}; }
};

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, std::optional<Tensor> scale,
                      std::optional<Tensor> shift, int64_t stride) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  const Tensor w = weight_of(weight, x, in.c);
  const Filter filter = filter_of(w, x, stride);
  const Prologue prologue(scale, shift, x, in.c);
  Tensor y = new_tensor(
      x, {in.n, in.c, depthwise_out_size(in.h, stride), depthwise_out_size(in.w, stride)});
  if (y.numel() == 0) return y;
  run(x, [&](Stream stream) {
    cuda::depthwise_conv(dtype, in, filter, prologue.pointers(), y.mutable_data_ptr(), stream);
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
    cuda::depthwise_conv_grad_input(dtype, in, filter, output_of(dx), height, width, false, stream);
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
  const Prologue prologue(scale, shift, x, in.c);
  Tensor dw = empty(x, {in.c, 1, kernel, kernel}, sum_dtype(x));
  if (x.numel() == 0) {
    torch::stable::zero_(dw);
    return dw;
  }
  const int64_t slices = cuda::grad_weight_slices(dtype, g, kernel, stride);
  const Tensor partial = slices == 1 ? dw : empty(x, {slices, in.c, kernel, kernel}, sum_dtype(x));
  run(x, [&](Stream stream) {
    cuda::depthwise_conv_grad_weight(dtype, in, g, prologue.pointers(), kernel, stride,
                                     partial.mutable_data_ptr(), dw.mutable_data_ptr(), stream);
  });
  return dw;
}

STABLE_TORCH_LIBRARY_IMPL(revkernels, CUDA, m) {
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("depthwise_conv_grad_input", TORCH_BOX(&depthwise_conv_grad_input));
  m.impl("depthwise_conv_grad_weight", TORCH_BOX(&depthwise_conv_grad_weight));
}

}  // namespace
}  // namespace revkernels
