// BatchNorm as an affine map, and the gradient of that: a few numbers per channel, in float64.
#include <cmath>
#include <tuple>

#include "tensors.h"

namespace revkernels {
namespace {

template <class T, class Body>
void with_values(const Tensor& t, const Body& body) {
  body(static_cast<T*>(t.data_ptr()));
}

// body(pointer) for float32 or float64 tensors.
template <class Body>
void as_float(const Tensor& t, const Name& name, const Body& body) {
  if (t.scalar_type() == ScalarType::Double) {
    with_values<double>(t, body);
  } else {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name,
                    ": expected float32 or float64, got ",
                    torch::headeronly::toString(t.scalar_type()));
    with_values<float>(t, body);
  }
}

// A vector [C], read as float64.
class Values {
 public:
  Values(const Tensor& t, const Name& name, int64_t c) : stride_(t.dim() == 1 ? t.stride(0) : 0) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == c, name, ": expected a CPU tensor [",
                    c, "], got ", shape_of(t));
    check_storage(t, name);
    as_float(t, name, [&](auto* data) { set(data); });
  }
  double operator[](int64_t i) const { return f64_ ? f64_[i * stride_] : f32_[i * stride_]; }

 private:
  void set(const float* data) { f32_ = data; }
  void set(const double* data) { f64_ = data; }
  const float* f32_ = nullptr;
  const double* f64_ = nullptr;
  int64_t stride_;
};

// [K, N, C] or [N, C], read as float64; an absent one has no data.
class Rows {
 public:
  Rows() = default;
  Rows(const Tensor& t, const Name& name, int64_t n, int64_t c) {
    const int64_t d = t.dim();
    STD_TORCH_CHECK(t.is_cpu() && d >= 2 && t.size(d - 2) == n && t.size(d - 1) == c, name,
                    ": expected a CPU tensor [.., ", n, ", ", c, "], got ", shape_of(t));
    check_storage(t, name);
    sk_ = d == 3 ? t.stride(0) : 0, sn_ = t.stride(d - 2), sc_ = t.stride(d - 1);
    as_float(t, name, [&](auto* data) { set(data); });
  }
  explicit operator bool() const { return f32_ || f64_; }
  // out[c] = the values of row (k, n).
  void read(int64_t k, int64_t n, double* out, int64_t channels) const {
    const int64_t start = k * sk_ + n * sn_;
    f64_ ? copy(f64_ + start, out, channels) : copy(f32_ + start, out, channels);
  }

 private:
  void set(const float* data) { f32_ = data; }
  void set(const double* data) { f64_ = data; }
  template <class T>
  void copy(const T* in, double* out, int64_t channels) const {
    if (sc_ == 1) {
      for (int64_t c = 0; c < channels; ++c) out[c] = in[c];
    } else {
      for (int64_t c = 0; c < channels; ++c) out[c] = in[c * sc_];
    }
  }
  const float* f32_ = nullptr;
  const double* f64_ = nullptr;
  int64_t sk_ = 0, sn_ = 0, sc_ = 0;
};

void check_updated(const std::optional<Tensor>& t, const Name& name, int64_t channels) {
  if (!t.has_value()) return;
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == channels &&
                      (channels <= 1 || t->stride(0) == 1),
                  name, ": expected a contiguous CPU tensor [", channels, "], got ", shape_of(*t));
  check_storage(*t, name);
}

std::tuple<Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& var,
                                           const Tensor& weight, const Tensor& bias,
                                           std::optional<Tensor> running_mean,
                                           std::optional<Tensor> running_var,
                                           std::optional<Tensor> batches, double momentum,
                                           int64_t count, double eps) {
  const int64_t channels = mean.dim() == 1 ? mean.size(0) : -1;
  const Values m(mean, "mean", channels), v(var, "var", channels);
  const Values w(weight, "weight", channels), b(bias, "bias", channels);
  check_updated(running_mean, "running_mean", channels);
  check_updated(running_var, "running_var", channels);
  int64_t* seen = batches.has_value() ? counter_of(*batches, "batches") : nullptr;
  const std::vector<Argument> arguments = {{running_mean, "running_mean"},
                                           {running_var, "running_var"},
                                           {batches, "batches"},
                                           {mean, "mean"},
                                           {var, "var"},
                                           {weight, "weight"},
                                           {bias, "bias"}};
  for (int written = 0; written < 3; ++written) check_apart(arguments[written], arguments);
  Tensor rstd = new_tensor(mean, {channels}), scale = new_tensor(mean, {channels}),
         shift = new_tensor(mean, {channels});
  as_float(mean, "mean", [&](auto* like) {
    using A = std::remove_pointer_t<decltype(like)>;
    A* r = static_cast<A*>(rstd.data_ptr());
    A* a = static_cast<A*>(scale.data_ptr());
    A* s = static_cast<A*>(shift.data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      r[c] = A(1 / std::sqrt(v[c] + eps));
      a[c] = A(w[c] * double(r[c]));
      s[c] = A(b[c] - m[c] * double(a[c]));
    }
  });
  const auto move_to = [&](const std::optional<Tensor>& running, const Name& name, const Values& to,
                           double factor) {
    if (!running.has_value()) return;
    as_float(*running, name, [&](auto* data) {
      using A = std::remove_pointer_t<decltype(data)>;
      for (int64_t c = 0; c < channels; ++c) {
        data[c] = A(data[c] + momentum * (to[c] * factor - data[c]));
      }
    });
  };
  move_to(running_mean, "running_mean", m, 1);
  move_to(running_var, "running_var", v, double(count) / double(count - 1));
  if (seen) ++*seen;
  return {rstd, scale, shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fold_grad(
    const Tensor& sums, std::optional<Tensor> gate, std::optional<Tensor> dpool, const Tensor& mean,
    const Tensor& rstd, const Tensor& scale, int64_t count, bool batch) {
  STD_TORCH_CHECK(sums.dim() == 3 && (sums.size(0) == 2 || sums.size(0) == 5),
                  "sums: expected [2, N, C] or [5, N, C], got ", shape_of(sums));
  const int64_t first = sums.size(0) == 5, samples = sums.size(1), channels = sums.size(2);
  STD_TORCH_CHECK(first || !dpool.has_value(), "dpool: needs five sums, got ", shape_of(sums));
  const Rows s(sums, "sums", samples, channels);
  const Rows g = gate ? Rows(*gate, "gate", samples, channels) : Rows();
  const Rows p = dpool ? Rows(*dpool, "dpool", samples, channels) : Rows();
  const Values m(mean, "mean", channels), r(rstd, "rstd", channels), a(scale, "scale", channels);
  Tensor dweight = new_tensor(mean, {channels}), dbias = new_tensor(mean, {channels}),
         slope = new_tensor(mean, {channels}), offset = new_tensor(mean, {channels});
  std::vector<double> scratch(size_t(4 * channels));  // the two sums, and two rows
  double *sum = scratch.data(), *centred = sum + channels, *by = centred + channels,
         *row = by + channels;
  const auto add = [&](int64_t k, int64_t n, double* total, bool weighted) {
    s.read(k, n, row, channels);
    for (int64_t c = 0; c < channels; ++c) total[c] += weighted ? by[c] * row[c] : row[c];
  };
  for (int64_t n = 0; n < samples; ++n) {
    if (g) g.read(0, n, by, channels);
    add(first, n, sum, bool(g));
    add(first + 1, n, centred, bool(g));
    if (!p) continue;
    p.read(0, n, by, channels);
    add(3, n, sum, true);
    add(4, n, centred, true);
  }
  as_float(mean, "mean", [&](auto* like) {
    using A = std::remove_pointer_t<decltype(like)>;
    A* dw = static_cast<A*>(dweight.data_ptr());
    A* db = static_cast<A*>(dbias.data_ptr());
    A* sl = static_cast<A*>(slope.data_ptr());
    A* of = static_cast<A*>(offset.data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      const double d = r[c] * centred[c], k = batch ? -a[c] / double(count) : 0;
      dw[c] = A(d);
      db[c] = A(sum[c]);
      sl[c] = A(k * r[c] * d);
      of[c] = A(k * sum[c] - k * r[c] * d * m[c]);
    }
  });
  return {dweight, dbias, slope, offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) {
  m.impl("bn_fold", TORCH_BOX(&bn_fold));
  m.impl("bn_fold_grad", TORCH_BOX(&bn_fold_grad));
}

}  // namespace revkernels
