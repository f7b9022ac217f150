#include "tensors.h"

namespace revkernels {
namespace {

// [C, 1, k, k] of any dtype and strides as [C, k, k], contiguous, in the accumulate dtype: itself
// if it already is that, else a copy kept here.
struct DenseWeight {
  std::vector<char> copy;
  const void* data;
  int64_t kernel;

  DenseWeight(const Tensor& weight, int64_t channels, bool wide) {
    const Map w = map_of(weight, "weight");
    STD_TORCH_CHECK(w.n == channels && w.c == 1 && w.h == w.w && w.h % 2 == 1,
                    "weight: expected [C, 1, k, k] with C = ", channels, " and k odd, got ",
                    shape_of(weight));
    kernel = w.h;
    data = w.data;
    if (weight.is_contiguous() && w.dtype == (wide ? DType::float64 : DType::float32)) return;
    const int64_t taps = w.h * w.w;
    copy.resize(size_t(channels * taps) * (wide ? sizeof(double) : sizeof(float)));
    data = copy.data();
    for (int64_t i = 0; i < channels * taps; ++i) {
      const double value = at(w, i / taps * w.sn + i % taps / w.w * w.sh + i % w.w * w.sw);
      if (wide) {
        reinterpret_cast<double*>(copy.data())[i] = value;
      } else {
        reinterpret_cast<float*>(copy.data())[i] = float(value);
      }
    }
  }

  static double at(const Map& w, int64_t i) {
    switch (w.dtype) {
      case DType::float32:
        return static_cast<const float*>(w.data)[i];
      case DType::float64:
        return static_cast<const double*>(w.data)[i];
      case DType::float16:
        return to_float(static_cast<const float16*>(w.data)[i]);
      case DType::bfloat16:
        return to_float(static_cast<const bfloat16*>(w.data)[i]);
    }
    return 0;
  }
};

void set_prologue(DepthwiseArgs& args, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& shift) {
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale, shift: give both or neither");
  args.scale = coefficient_of(scale, "scale", args.in.n, args.in.c);
  args.shift = coefficient_of(shift, "shift", args.in.n, args.in.c);
}

void check_stride(int64_t stride) {
  STD_TORCH_CHECK(stride >= 1, "stride: expected at least 1, got ", stride);
}

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, std::optional<Tensor> scale,
                      std::optional<Tensor> shift, int64_t stride) {
  check_stride(stride);
  DepthwiseArgs args;
  args.in = input_of(x, "x");
  args.stride = stride;
  args.wide = is_wide(args.in);
  set_prologue(args, scale, shift);
  const DenseWeight dense(weight, args.in.c, args.wide);
  args.weight = dense.data;
  args.kernel = dense.kernel;
  const std::vector<int64_t> shape = {args.in.n, args.in.c, depthwise_out_size(args.in.h, stride),
                                      depthwise_out_size(args.in.w, stride)};
  Tensor y = args.in.dtype == DType::int16 ? new_sums(x, shape) : new_tensor(x, shape);
  args.out = map_of(y, "y");
  if (numel(args.in) > 0) {
    const int64_t work = numel(args.in) + numel(args.out) * args.kernel * args.kernel / 16;
    run(kernels().depthwise, args, args.in.n * args.in.c, work);
  }
  return y;
}

Tensor depthwise_conv_grad_input(const Tensor& dy, const Tensor& weight, int64_t height,
                                 int64_t width, int64_t stride) {
  check_stride(stride);
  STD_TORCH_CHECK(height >= 0 && width >= 0, "height, width: expected sizes, got ", height, ", ",
                  width);
  const Map g = map_of(dy, "dy");
  DepthwiseArgs args;
  args.in = map_of(dy, "dy", g.n, g.c, depthwise_out_size(height, stride),
                   depthwise_out_size(width, stride));
  args.stride = stride;
  args.wide = is_wide(g);
  const DenseWeight dense(weight, g.c, args.wide);
  args.weight = dense.data;
  args.kernel = dense.kernel;
  Tensor dv = new_tensor(dy, {g.n, g.c, height, width});
  args.out = map_of(dv, "dv");
  if (numel(args.out) > 0) {
    const int64_t work = numel(args.out) + numel(g) * args.kernel * args.kernel / 16;
    run(kernels().depthwise_grad_input, args, g.n * g.c, work);
  }
  return dv;
}

Tensor depthwise_conv_grad_weight(const Tensor& x, const Tensor& dy, std::optional<Tensor> scale,
                                  std::optional<Tensor> shift, int64_t kernel, int64_t stride) {
  check_stride(stride);
  STD_TORCH_CHECK(kernel >= 1 && kernel % 2 == 1, "kernel: expected an odd size, got ", kernel);
  DepthwiseArgs args;
  args.in = input_of(x, "x");
  const Map& in = args.in;
  args.dy = map_of(dy, "dy", in.n, in.c, depthwise_out_size(in.h, stride),
                   depthwise_out_size(in.w, stride));
  args.kernel = kernel;
  args.stride = stride;
  args.wide = is_wide(in);
  set_prologue(args, scale, shift);

  // Two stages in an order that no thread count changes: samples within a group, then the groups.
  const int64_t taps = kernel * kernel, size = in.c * taps;
  const int64_t groups = numel(in) > 0 ? ceil_div(in.n, kSamplesPerPartial) : 0;
  Tensor dw = new_sums(x, {in.c, 1, kernel, kernel});
  Tensor partial = groups > 1 ? new_sums(x, {groups, in.c, kernel, kernel}) : dw;
  if (groups == 0) {
    torch::stable::zero_(dw);
    return dw;
  }
  args.partial = partial.data_ptr();
  run(kernels().depthwise_grad_weight, args, groups * in.c, numel(in) + numel(args.dy) * taps / 16);
  const auto add_groups = [&](auto* out, const auto* in_groups) {
    for (int64_t i = 0; i < size; ++i) {
      out[i] = in_groups[i];
      for (int64_t g = 1; g < groups; ++g) out[i] += in_groups[g * size + i];
    }
  };
  if (groups > 1) {
    if (args.wide) {
      add_groups(static_cast<double*>(dw.data_ptr()),
                 static_cast<const double*>(partial.data_ptr()));
    } else {
      add_groups(static_cast<float*>(dw.data_ptr()), static_cast<const float*>(partial.data_ptr()));
    }
  }
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) {
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("depthwise_conv_grad_input", TORCH_BOX(&depthwise_conv_grad_input));
  m.impl("depthwise_conv_grad_weight", TORCH_BOX(&depthwise_conv_grad_weight));
}

}  // namespace revkernels
