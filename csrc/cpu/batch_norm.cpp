#include <cmath>
#include <tuple>

#include "tensors.h"

namespace revkernels {
namespace {

NormArgs norm_args(const Tensor& x, const Tensor& scale, const Tensor& shift,
                   const std::string& act) {
  NormArgs args;
  args.x = map_of(x, "x");
  args.wide = is_wide(args.x);
  args.scale = coefficient_of(scale, "scale", args.x.n, args.x.c);
  args.shift = coefficient_of(shift, "shift", args.x.n, args.x.c);
  args.act = activation_of(act);
  return args;
}

void run_planes(void (*kernel)(const NormArgs&, int64_t, int64_t), const NormArgs& args,
                int64_t maps) {
  if (numel(args.x) > 0) run(kernel, args, args.x.n * args.x.c, numel(args.x) * maps);
}

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x) {
  NormArgs args;
  args.x = map_of(x, "x");
  args.wide = is_wide(args.x);
  const int64_t n = args.x.n, c = args.x.c, area = args.x.h * args.x.w;
  Tensor mean = new_sums(x, {c}), var = new_sums(x, {c});
  std::vector<double> moments(size_t(2 * n * c));
  args.moments = moments.data();
  run_planes(kernels().bn_moments, args, 1);

  // Chan's formula over the samples, in order; every plane has the same number of values.
  const auto store = [&](auto* mean_out, auto* var_out) {
    for (int64_t ch = 0; ch < c; ++ch) {
      double m = n * area > 0 ? 0 : NAN, m2 = m;  // of no values, as in PyTorch
      for (int64_t i = 0; i < n; ++i) {
        const double* plane = &moments[size_t(2 * (i * c + ch))];
        const double delta = plane[0] - m;
        m += delta / double(i + 1);
        m2 += plane[1] + delta * delta * double(area) * double(i) / double(i + 1);
      }
      mean_out[ch] = m;
      var_out[ch] = m2 / double(n * area);
    }
  };
  if (args.wide) {
    store(static_cast<double*>(mean.data_ptr()), static_cast<double*>(var.data_ptr()));
  } else {
    store(static_cast<float*>(mean.data_ptr()), static_cast<float*>(var.data_ptr()));
  }
  return {mean, var};
}

Tensor bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift, std::optional<Tensor> gate,
              std::string act) {
  NormArgs args = norm_args(x, scale, shift, act);
  args.gate = coefficient_of(gate, "gate", args.x.n, args.x.c, false, true);
  Tensor z = new_tensor(x, {args.x.n, args.x.c, args.x.h, args.x.w});
  args.out = map_of(z, "z");
  run_planes(kernels().bn_act, args, 1);
  return z;
}

Tensor bn_act_squeeze(const Tensor& x, const Tensor& scale, const Tensor& shift, std::string act) {
  NormArgs args = norm_args(x, scale, shift, act);
  STD_TORCH_CHECK(args.x.h * args.x.w > 0 || args.x.n * args.x.c == 0,
                  "x: an empty map has no mean, got ", shape_of(x));
  Tensor pooled = new_sums(x, {args.x.n, args.x.c});
  args.sums = pooled.data_ptr();
  run_planes(kernels().bn_act_squeeze, args, 1);
  return pooled;
}

Tensor bn_act_grad_sums(const Tensor& dz, const Tensor& x, const Tensor& scale, const Tensor& shift,
                        const Tensor& mean, std::string act) {
  NormArgs args = norm_args(x, scale, shift, act);
  args.dz = map_of(dz, "dz", args.x.n, args.x.c, args.x.h, args.x.w);
  args.mean = coefficient_of(mean, "mean", args.x.n, args.x.c);
  Tensor sums = new_sums(x, {5, args.x.n, args.x.c});
  if (numel(args.x) == 0) torch::stable::zero_(sums);
  args.sums = sums.data_ptr();
  args.sums_stride = args.x.n * args.x.c;
  run_planes(kernels().bn_act_grad_sums, args, 2);
  return sums;
}

Tensor bn_act_grad(const Tensor& dz, const Tensor& x, const Tensor& scale, const Tensor& shift,
                   std::optional<Tensor> gate, std::optional<Tensor> dpool,
                   std::optional<Tensor> slope, std::optional<Tensor> offset, std::string act) {
  NormArgs args = norm_args(x, scale, shift, act);
  args.dz = map_of(dz, "dz", args.x.n, args.x.c, args.x.h, args.x.w);
  args.gate = coefficient_of(gate, "gate", args.x.n, args.x.c, false, true);
  args.dpool = coefficient_of(dpool, "dpool", args.x.n, args.x.c, false, true);
  args.slope = coefficient_of(slope, "slope", args.x.n, args.x.c);
  args.offset = coefficient_of(offset, "offset", args.x.n, args.x.c);
  Tensor dx = new_tensor(x, {args.x.n, args.x.c, args.x.h, args.x.w});
  args.out = map_of(dx, "dx");
  run_planes(kernels().bn_act_grad, args, 2);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&bn_stats));
  m.impl("bn_act", TORCH_BOX(&bn_act));
  m.impl("bn_act_squeeze", TORCH_BOX(&bn_act_squeeze));
  m.impl("bn_act_grad_sums", TORCH_BOX(&bn_act_grad_sums));
  m.impl("bn_act_grad", TORCH_BOX(&bn_act_grad));
}

}  // namespace revkernels
