// BatchNorm, activation and squeeze-excite's products over maps: checks and allocation.
#include <tuple>

#include "tensors.h"

namespace revkernels {
namespace {

using namespace cuda;

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  Tensor mean = new_sums(x, {in.c}), var = new_sums(x, {in.c});
  if (in.c == 0) return {mean, var};
  if (x.numel() == 0) {
    torch::stable::fill_(mean, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(var, std::numeric_limits<double>::quiet_NaN());
    return {mean, var};
  }
  const Tensor moments = empty(x, {in.n, in.c, 2}, ScalarType::Double);
  double* planes = static_cast<double*>(moments.mutable_data_ptr());
  run(x, [&](Stream stream) {
    cuda::bn_statistics(dtype, in, planes, mean.mutable_data_ptr(), var.mutable_data_ptr(), nullptr,
                        stream);
  });
  return {mean, var};
}

// A running statistic, updated in place: it cannot be copied to another dtype.
void* running_of(const std::optional<Tensor>& t, const char* name, const Tensor& mean) {
  if (!t.has_value()) return nullptr;
  check_same_device(*t, name, mean);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == mean.size(0) && t->is_contiguous() &&
                      t->scalar_type() == mean.scalar_type(),
                  name, ": expected a contiguous [", mean.size(0), "] of mean's dtype, got ",
                  shape_of(*t), " of ", torch::headeronly::toString(t->scalar_type()));
  check_storage(*t, name);
  return t->mutable_data_ptr();
}

void check_sums(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double,
                  name, ": expected float32 or float64, got ",
                  torch::headeronly::toString(t.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& var,
                                           const Tensor& weight, const Tensor& bias,
                                           std::optional<Tensor> running_mean,
                                           std::optional<Tensor> running_var,
                                           std::optional<Tensor> batches, double momentum,
                                           int64_t count, double eps) {
  STD_TORCH_CHECK(mean.is_cuda() && mean.dim() == 1, "mean: expected a CUDA tensor [C], got ",
                  shape_of(mean));
  check_sums(mean, "mean");
  const int64_t c = mean.size(0);
  const Values m(mean, "mean", mean, {c}), v(var, "var", mean, {c});
  const Values w(weight, "weight", mean, {c}), b(bias, "bias", mean, {c});
  if (batches.has_value()) {
    check_same_device(*batches, "batches", mean);
    STD_TORCH_CHECK(batches->scalar_type() == ScalarType::Long && batches->numel() == 1,
                    "batches: expected one int64, got ", shape_of(*batches));
    check_storage(*batches, "batches");
  }
  const std::vector<Argument> arguments = {{running_mean, "running_mean"},
                                           {running_var, "running_var"},
                                           {batches, "batches"},
                                           {mean, "mean"},
                                           {var, "var"},
                                           {weight, "weight"},
                                           {bias, "bias"}};
  for (int written = 0; written < 3; ++written) check_apart(arguments[written], arguments);
  Tensor rstd = new_sums(mean, {c}), scale = new_sums(mean, {c}), shift = new_sums(mean, {c});
  const Fold fold{w.data(),
                  b.data(),
                  running_of(running_mean, "running_mean", mean),
                  running_of(running_var, "running_var", mean),
                  batches ? static_cast<int64_t*>(batches->mutable_data_ptr()) : nullptr,
                  momentum,
                  eps,
                  count,
                  rstd.mutable_data_ptr(),
                  scale.mutable_data_ptr(),
                  shift.mutable_data_ptr()};
  if (c > 0) {
    run(mean, [&](Stream stream) {
      cuda::bn_fold(dtype_of(mean, "mean"), c, m.data(), v.data(), fold, stream);
    });
  }
  return {rstd, scale, shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fold_grad(
    const Tensor& sums, std::optional<Tensor> gate, std::optional<Tensor> dpool, const Tensor& mean,
    const Tensor& rstd, const Tensor& scale, int64_t count, bool batch) {
  STD_TORCH_CHECK(sums.is_cuda() && sums.dim() == 3 && (sums.size(0) == 2 || sums.size(0) == 5),
                  "sums: expected a CUDA tensor [2, N, C] or [5, N, C], got ", shape_of(sums));
  check_sums(mean, "mean");
  const bool five = sums.size(0) == 5;
  const int64_t n = sums.size(1), c = sums.size(2);
  STD_TORCH_CHECK(five || !dpool.has_value(), "dpool: needs five sums, got ", shape_of(sums));
  const Tensor s = small_tensor(sums, "sums", mean, false);
  std::optional<Tensor> g;
  if (gate.has_value()) {  // read with its own strides: stochastic depth has one value per sample
    STD_TORCH_CHECK(gate->dim() == 2 && gate->size(0) == n && gate->size(1) == c,
                    "gate: expected [", n, ", ", c, "], got ", shape_of(*gate));
    check_same_device(*gate, "gate", mean);
    check_storage(*gate, "gate");
    g = gate->scalar_type() == sum_dtype(mean) ? *gate : torch::stable::to(*gate, sum_dtype(mean));
  }
  const Values p(dpool, "dpool", mean, {n, c});
  const Values m(mean, "mean", mean, {c}), r(rstd, "rstd", mean, {c}), a(scale, "scale", mean, {c});
  Tensor dweight = new_sums(mean, {c}), dbias = new_sums(mean, {c});
  Tensor slope = new_sums(mean, {c}), offset = new_sums(mean, {c});
  if (c == 0) return {dweight, dbias, slope, offset};
  const FoldGrad args{s.const_data_ptr(),
                      n * c,
                      five,
                      g ? g->const_data_ptr() : nullptr,
                      g ? g->stride(0) : 0,
                      g ? g->stride(1) : 0,
                      p.data(),
                      m.data(),
                      r.data(),
                      a.data(),
                      n,
                      c,
                      count,
                      batch,
                      dweight.mutable_data_ptr(),
                      dbias.mutable_data_ptr(),
                      slope.mutable_data_ptr(),
                      offset.mutable_data_ptr()};
  run(mean, [&](Stream stream) { cuda::bn_fold_grad(dtype_of(mean, "mean"), args, stream); });
  return {dweight, dbias, slope, offset};
}

// The vectors of gate h(scale x + shift).
struct Vectors {
  Values scale, shift, gate;
  Activation act;

  Vectors(const Tensor& a, const Tensor& b, const std::optional<Tensor>& g, const std::string& h,
          const Tensor& x, const Map& m)
      : scale(a, "scale", x, {m.c}),
        shift(b, "shift", x, {m.c}),
        gate(g, "gate", x, {m.n, m.c}),
        act(activation_of(h)) {}
  Norm norm() const { return {scale.data(), shift.data(), gate.data(), act}; }
};

Tensor bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift, std::optional<Tensor> gate,
              std::string act) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  const Vectors vectors(scale, shift, gate, act, x, in);
  Tensor z = new_tensor(x, {in.n, in.c, in.h, in.w});
  if (z.numel() == 0) return z;
  run(x, [&](Stream stream) { cuda::bn_act(dtype, in, vectors.norm(), output_of(z), stream); });
  return z;
}

Tensor bn_act_squeeze(const Tensor& x, const Tensor& scale, const Tensor& shift, std::string act) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  const Vectors vectors(scale, shift, std::nullopt, act, x, in);
  Tensor pooled = new_sums(x, {in.n, in.c});
  if (pooled.numel() == 0) return pooled;
  if (x.numel() == 0) return torch::stable::fill_(pooled, std::numeric_limits<double>::quiet_NaN());
  const int64_t parts = cuda::plane_parts(in);
  const Tensor partial = parts == 1 ? pooled : new_sums(x, {parts, in.n, in.c});
  run(x, [&](Stream stream) {
    cuda::bn_act_squeeze(dtype, in, vectors.norm(), partial.mutable_data_ptr(),
                         pooled.mutable_data_ptr(), stream);
  });
  return pooled;
}

// dz as a map like x, in x's dtype: mixed dtypes do not occur in training.
struct Gradient {
  Tensor kept;
  Map map;

  Gradient(const Tensor& dz, const Tensor& x, const Map& in)
      : kept(dz.scalar_type() == x.scalar_type() ? dz : torch::stable::to(dz, x.scalar_type())),
        map(map_of(kept, "dz")) {
    check_same_device(dz, "dz", x);
    check_storage(dz, "dz");
    check_shape(map, dz, "dz", in.n, in.c, in.h, in.w);
  }
};

Tensor bn_act_grad_sums(const Tensor& dz, const Tensor& x, const Tensor& scale, const Tensor& shift,
                        const Tensor& mean, std::string act) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  const Gradient gradient(dz, x, in);
  const Vectors vectors(scale, shift, std::nullopt, act, x, in);
  const Values center(mean, "mean", x, {in.c});
  Tensor sums = new_sums(x, {5, in.n, in.c});
  if (sums.numel() == 0) return sums;
  if (x.numel() == 0) return torch::stable::zero_(sums);
  const int64_t parts = cuda::plane_parts(in);
  const Tensor partial = parts == 1 ? sums : new_sums(x, {parts, 5, in.n, in.c});
  run(x, [&](Stream stream) {
    cuda::bn_act_grad_sums(dtype, gradient.map, in, vectors.norm(), center.data(),
                           partial.mutable_data_ptr(), sums.mutable_data_ptr(), in.n * in.c,
                           nullptr, stream);
  });
  return sums;
}

Tensor bn_act_grad(const Tensor& dz, const Tensor& x, const Tensor& scale, const Tensor& shift,
                   std::optional<Tensor> gate, std::optional<Tensor> dpool,
                   std::optional<Tensor> slope, std::optional<Tensor> offset, std::string act) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  const Gradient gradient(dz, x, in);
  const Vectors vectors(scale, shift, gate, act, x, in);
  const Values pool(dpool, "dpool", x, {in.n, in.c});
  const Values a(slope, "slope", x, {in.c}), b(offset, "offset", x, {in.c});
  Tensor dx = new_tensor(x, {in.n, in.c, in.h, in.w});
  if (dx.numel() == 0) return dx;
  run(x, [&](Stream stream) {
    cuda::bn_act_grad(dtype, dtype, gradient.map, in, vectors.norm(),
                      {pool.data(), a.data(), b.data()}, output_of(dx), stream);
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(revkernels, CUDA, m) {
  m.impl("bn_stats", TORCH_BOX(&bn_stats));
  m.impl("bn_fold", TORCH_BOX(&bn_fold));
  m.impl("bn_fold_grad", TORCH_BOX(&bn_fold_grad));
  m.impl("bn_act", TORCH_BOX(&bn_act));
  m.impl("bn_act_squeeze", TORCH_BOX(&bn_act_squeeze));
  m.impl("bn_act_grad_sums", TORCH_BOX(&bn_act_grad_sums));
  m.impl("bn_act_grad", TORCH_BOX(&bn_act_grad));
}

}  // namespace
}  // namespace revkernels
