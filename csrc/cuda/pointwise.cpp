// The 1x1 convolution and its weight gradient: checks and allocation.
#include "torch_device.h"

namespace revkernels {
namespace {

using namespace cuda;

Tensor as(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// The prologue z = gate hardswish(scale x + shift), or z = x.
struct Prologue {
  Values scale, shift, gate;

  Prologue(const std::optional<Tensor>& a, const std::optional<Tensor>& b,
           const std::optional<Tensor>& g, const Tensor& x, const Map& m)
      : scale(a, "scale", x, {m.c}), shift(b, "shift", x, {m.c}), gate(g, "gate", x, {m.n, m.c}) {
    STD_TORCH_CHECK(a.has_value() == b.has_value(), "scale, shift: give both or neither");
    STD_TORCH_CHECK(a.has_value() || !g.has_value(), "gate: needs scale and shift");
  }
  Norm norm() const {
    const bool given = scale.data() != nullptr;
    return {scale.data(), shift.data(), gate.data(),
            given ? Activation::hardswish : Activation::identity};
  }
};

void pointwise_conv_(Tensor y, const Tensor& x, const Tensor& weight, std::optional<Tensor> scale,
                     std::optional<Tensor> shift, std::optional<Tensor> gate) {
  const Map in = map_of(x, "x"), out = map_of(y, "y");
  const Dtype dtype = dtype_of(y, "y");
  STD_TORCH_CHECK((dtype_of(x, "x") == Dtype::float64) == (dtype == Dtype::float64),
                  "y: expected float64 if and only if x is, got ",
                  torch::headeronly::toString(y.scalar_type()));
  check_same_device(y, "y", x);
  check_same_device(weight, "weight", x);
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(1) == in.c && weight.size(2) == 1 && weight.size(3) == 1,
      "weight: expected [O, C, 1, 1] with C = ", in.c, ", got ", shape_of(weight));
  check_shape(out, y, "y", in.n, weight.size(0), in.h, in.w);
  check_distinct(out, "y");
  check_storage(weight, "weight");
  check_apart({y, "y"},
              {{x, "x"}, {weight, "weight"}, {scale, "scale"}, {shift, "shift"}, {gate, "gate"}});
  const Prologue prologue(scale, shift, gate, x, in);
  if (y.numel() == 0) return;
  if (x.numel() == 0) {
    torch::stable::zero_(y);
    return;
  }
  const Tensor w = as(weight, y.scalar_type());
  const Matrices matrix{w.const_data_ptr(), 1, out.c, in.c, 0, w.stride(0), w.stride(1)};
  TorchDevice device(x);
  Tensor z = x;
  Norm norm = prologue.norm();
  if (x.scalar_type() != y.scalar_type()) {  // z is rounded to x's dtype, then to y's
    if (norm.scale != nullptr) {
      z = new_tensor(x, {in.n, in.c, in.h, in.w});
      cuda::bn_act(dtype_of(x, "x"), in, norm, output_of(z), device.stream);
      norm = {nullptr, nullptr, nullptr, Activation::identity};
    }
    z = torch::stable::to(z, y.scalar_type());
  }
  const Map operand = map_of(z, "x");
  if (is_dense(out)) {
    pointwise(device, dtype, out, operand, matrix, norm, false);
  } else {
    const Tensor product = new_tensor(y, {in.n, out.c, in.h, in.w});
    const Map map = map_of(product, "y");
    pointwise(device, dtype, map, operand, matrix, norm, false);
    cuda::convert(dtype, map, dtype, out, 1, false, device.stream);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor pointwise_conv_grad_weight(const Tensor& x, const Tensor& dy, std::optional<Tensor> scale,
                                  std::optional<Tensor> shift, std::optional<Tensor> gate) {
  const Map in = map_of(x, "x");
  dtype_of(x, "x");
  dtype_of(dy, "dy");
  check_same_device(dy, "dy", x);
  check_storage(x, "x");
  check_storage(dy, "dy");
  // Mixed dtypes do not occur in training: both in that of the sums.
  const bool mixed = x.scalar_type() != dy.scalar_type();
  const Tensor z = mixed ? as(x, sum_dtype(x)) : x, g = mixed ? as(dy, sum_dtype(x)) : dy;
  const Map map = map_of(z, "x"), gradient = map_of(g, "dy");
  check_shape(gradient, dy, "dy", in.n, gradient.c, in.h, in.w);
  const Prologue prologue(scale, shift, gate, x, in);
  Tensor dw = new_sums(x, {gradient.c, in.c, 1, 1});
  if (dw.numel() == 0) return dw;
  if (x.numel() == 0) return torch::stable::zero_(dw);
  TorchDevice device(x);
  pointwise_grad_weight(device, dtype_of(z, "x"), dw.mutable_data_ptr(), map, gradient,
                        prologue.norm(), false);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return dw;
}

STABLE_TORCH_LIBRARY_IMPL(revkernels, CUDA, m) {
  m.impl("pointwise_conv_", TORCH_BOX(&pointwise_conv_));
  m.impl("pointwise_conv_grad_weight", TORCH_BOX(&pointwise_conv_grad_weight));
}

}  // namespace
}  // namespace revkernels
