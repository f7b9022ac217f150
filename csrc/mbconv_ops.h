// The three ops of an MBConv: from torch's tensors to mbconv.h, with the checks that keep memory
// safe. Every tensor is checked to be where x is and to lie within its storage.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "mbconv.h"
#include "storage.h"

namespace revkernels {

template <class Backend>
class MBConvCall {
 public:
  using Tensor = torch::stable::Tensor;
  using Optional = std::optional<Tensor>;
  using ScalarType = torch::headeronly::ScalarType;
  using Shape = std::vector<int64_t>;

  MBConv m;

  MBConvCall(const Tensor& x, std::optional<int64_t> fraction_bits, const Optional& expand,
             const Tensor& depthwise, const Optional& squeeze, const Optional& squeeze_bias,
             const Optional& excite, const Optional& excite_bias, const Tensor& project,
             int64_t stride, int64_t chunk, const Tensor& planes, const char* planes_name)
      : x_(x) {
    STD_TORCH_CHECK(Backend::is_here(x), "x: expected a ", Backend::kDevice, " tensor");
    const bool integer = x.scalar_type() == ScalarType::Short;
    STD_TORCH_CHECK(integer == fraction_bits.has_value(), "fraction_bits: expected ",
                    integer ? "an int, as x is int16" : "None, as x is not int16");
    if (integer) {
      STD_TORCH_CHECK(*fraction_bits >= -8 && *fraction_bits <= 24,
                      "fraction_bits: expected -8 to 24, got ", *fraction_bits);
      m.unit = std::ldexp(1.0, -int(*fraction_bits));
    }
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x: expected [N, C, H, W], not empty, got ",
                    text_of(x));
    m.x = map_of(x, "x", integer ? DType::int16 : float_of(x, "x"));
    m.planes = float_of(planes, planes_name);
    m.sums = m.planes == DType::float64 ? DType::float64 : DType::float32;
    STD_TORCH_CHECK((m.x.dtype == DType::float64) == (m.sums == DType::float64), planes_name,
                    ": expected float64 if and only if x has it, got ", dtype_text(planes));
    STD_TORCH_CHECK(stride >= 1, "stride: expected at least 1, got ", stride);
    STD_TORCH_CHECK(chunk >= 1, "chunk: expected at least 1, got ", chunk);
    m.chunk = chunk;

    STD_TORCH_CHECK(depthwise.dim() == 4, "depthwise: expected [E, 1, k, k], got ",
                    text_of(depthwise));
    const int64_t e = depthwise.size(0), k = depthwise.size(2);
    STD_TORCH_CHECK(k % 2 == 1, "depthwise: expected an odd kernel, got ", text_of(depthwise));
    m.depthwise = {vector(depthwise, "depthwise", {e, 1, k, k}), e, k, stride};
    if (expand.has_value()) {
      m.expand = {vector(*expand, "expand", {e, m.x.c, 1, 1}), e, m.x.c};
    } else {
      STD_TORCH_CHECK(e == m.x.c, "depthwise: expected [", m.x.c,
                      ", 1, k, k], as there is no expansion, got ", text_of(depthwise));
    }
    STD_TORCH_CHECK(project.dim() == 4, "project: expected [C', E, 1, 1], got ", text_of(project));
    m.project = {vector(project, "project", {project.size(0), e, 1, 1}), project.size(0), e};
    if (squeeze.has_value()) {
      STD_TORCH_CHECK(squeeze_bias.has_value() && excite.has_value() && excite_bias.has_value(),
                      "squeeze_bias, excite, excite_bias: expected tensors, as squeeze is given");
      const int64_t r = squeeze->dim() == 4 ? squeeze->size(0) : -1;
      m.se = {vector(*squeeze, "squeeze", {r, e, 1, 1}),
              vector(*squeeze_bias, "squeeze_bias", {r}),
              vector(*excite, "excite", {e, r, 1, 1}),
              vector(*excite_bias, "excite_bias", {e}),
              e,
              r};
    }
  }

  // A dense tensor of the type of sums and of this shape.
  void* vector(const Tensor& t, const char* name, const Shape& shape) {
    check(t, name, shape);
    STD_TORCH_CHECK(float_of(t, name) == m.sums, name, ": expected ",
                    m.sums == DType::float64 ? "float64" : "float32", ", got ", dtype_text(t));
    if (t.is_contiguous()) return t.data_ptr();
    copies_.push_back(torch::stable::contiguous(t));
    return copies_.back().data_ptr();
  }

  // Likewise, to be written to.
  void* written(const Tensor& t, const char* name, const Shape& shape) {
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
    return vector(t, name, shape);
  }

  // A dense plane of the planes' dtype; null data where there is none.
  Map plane(const Optional& t, const char* name, int64_t c, int64_t h, int64_t w) {
    if (!t.has_value()) return {};
    check(*t, name, {m.x.n, c, h, w});
    STD_TORCH_CHECK(t->is_contiguous(), name, ": expected a contiguous tensor");
    STD_TORCH_CHECK(float_of(*t, name) == m.planes, name, ": expected the planes' dtype, got ",
                    dtype_text(*t));
    return map_of(*t, name, m.planes);
  }
  Map projected(const Optional& p, const char* name) {
    return plane(p, name, m.channels(), m.height(), m.width());
  }
  Map expanded_out(const Optional& d, const char* name) {
    return plane(d, name, m.expanded(), m.height(), m.width());
  }
  Map expanded_in(const Optional& e, const char* name) {
    STD_TORCH_CHECK(m.expands() || !e.has_value(), name, ": there is no expansion");
    return plane(e, name, m.expanded(), m.x.h, m.x.w);
  }

  // A gradient of any float dtype and strides.
  Map gradient(const Tensor& t, const char* name, int64_t c, int64_t h, int64_t w) {
    check(t, name, {m.x.n, c, h, w});
    const DType dtype = float_of(t, name);
    STD_TORCH_CHECK((dtype == DType::float64) == (m.sums == DType::float64), name,
                    ": expected float64 if and only if x has it, got ", dtype_text(t));
    return map_of(t, name, dtype);
  }

  // Of the result p, in the planes' dtype or in that of sums.
  Map cotangent(const Tensor& t, const char* name) {
    const Map found = gradient(t, name, m.channels(), m.height(), m.width());
    STD_TORCH_CHECK(found.dtype == m.planes || found.dtype == m.sums, name,
                    ": expected the planes' dtype or float32, got ", dtype_text(t));
    return found;
  }

  // norms [4, columns]: mean, rstd, scale, shift of the norms side by side.
  int64_t norm_columns() const { return (m.expands() ? 2 : 1) * m.expanded() + m.channels(); }

  void set_norms(void* data, const std::vector<bool>& batch) {
    STD_TORCH_CHECK(batch.size() == 3, "batch: expected 3 flags, got ", batch.size());
    const int64_t columns = norm_columns(), item = bytes_of(m.sums);
    char* start = static_cast<char*>(data);
    for (int64_t k = m.expands() ? 0 : 1; k < 3; ++k) {
      const auto row = [&](int64_t i) { return start + i * columns * item; };
      const int64_t channels = k < 2 ? m.expanded() : m.channels();
      m.norms[k] = {row(0), row(1), row(2), row(3), channels, batch[size_t(k)]};
      start += channels * item;
    }
  }

  int64_t squeezed_size() const {
    return m.squeezes() ? m.x.n * (2 * m.expanded() + m.se.hidden) : 0;
  }

  Squeezed squeezed_at(void* data) const {
    if (!m.squeezes()) return {};
    const int64_t item = bytes_of(m.sums);
    char* gate = static_cast<char*>(data);
    char* hidden = gate + m.x.n * m.expanded() * item;
    return {gate, hidden, hidden + m.x.n * m.se.hidden * item};
  }

  Workspace workspace(const Tensor& t) {
    check(t, "workspace", {t.numel()});
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.is_contiguous(),
                    "workspace: expected a contiguous uint8 tensor, got ", dtype_text(t));
    return {t.data_ptr(), t.numel()};
  }

  Tensor sums(const Shape& shape) const {
    return empty(x_, shape, m.sums == DType::float64 ? ScalarType::Double : ScalarType::Float);
  }

  void check(const Tensor& t, const char* name, const Shape& shape) const {
    STD_TORCH_CHECK(Backend::is_here(t) && t.get_device_index() == x_.get_device_index(), name,
                    ": expected a tensor on the device of x");
    bool fits = t.dim() == int64_t(shape.size());
    for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == shape[size_t(d)];
    STD_TORCH_CHECK(fits, name, ": expected ", text_of(shape), ", got ", text_of(t));
    check_storage(t, name);
  }

 private:
  static std::string text_of(const Shape& shape) {
    std::string text;
    for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
  }
  static std::string text_of(const Tensor& t) {
    Shape shape;
    for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
    return text_of(shape);
  }
  static const char* dtype_text(const Tensor& t) {
    return torch::headeronly::toString(t.scalar_type());
  }
  static DType float_of(const Tensor& t, const char* name) {
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return DType::float32;
      case ScalarType::Double:
        return DType::float64;
      case ScalarType::Half:
        return DType::float16;
      case ScalarType::BFloat16:
        return DType::bfloat16;
      default:
        break;
    }
    STD_TORCH_CHECK(false, name, ": dtype ", dtype_text(t),
                    " is not supported; use float32, float64, float16 or bfloat16");
  }
  Map map_of(const Tensor& t, const char* name, DType dtype) const {
    check(t, name, {t.size(0), t.size(1), t.size(2), t.size(3)});
    return {t.data_ptr(), dtype,       t.size(0),   t.size(1),   t.size(2),
            t.size(3),    t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  }

  Tensor x_;
  std::vector<Tensor> copies_;
};

template <class Backend>
torch::stable::Tensor mbconv_op(
    const torch::stable::Tensor& x, std::optional<int64_t> fraction_bits,
    std::optional<torch::stable::Tensor> expand, std::optional<torch::stable::Tensor> gamma0,
    std::optional<torch::stable::Tensor> beta0, const torch::stable::Tensor& depthwise,
    const torch::stable::Tensor& gamma1, const torch::stable::Tensor& beta1,
    std::optional<torch::stable::Tensor> squeeze, std::optional<torch::stable::Tensor> squeeze_bias,
    std::optional<torch::stable::Tensor> excite, std::optional<torch::stable::Tensor> excite_bias,
    const torch::stable::Tensor& project, const torch::stable::Tensor& gamma2,
    const torch::stable::Tensor& beta2, std::optional<torch::stable::Tensor> mean0,
    std::optional<torch::stable::Tensor> var0, std::optional<torch::stable::Tensor> batches0,
    std::optional<torch::stable::Tensor> mean1, std::optional<torch::stable::Tensor> var1,
    std::optional<torch::stable::Tensor> batches1, std::optional<torch::stable::Tensor> mean2,
    std::optional<torch::stable::Tensor> var2, std::optional<torch::stable::Tensor> batches2,
    std::vector<bool> batch, std::vector<double> momentum, std::vector<double> eps, int64_t stride,
    int64_t chunk, std::optional<torch::stable::Tensor> given, const torch::stable::Tensor& p,
    std::optional<torch::stable::Tensor> d, const torch::stable::Tensor& workspace) {
  using Optional = std::optional<torch::stable::Tensor>;
  MBConvCall<Backend> call(x, fraction_bits, expand, depthwise, squeeze, squeeze_bias, excite,
                           excite_bias, project, stride, chunk, p, "p");
  STD_TORCH_CHECK(momentum.size() == 3, "momentum: expected 3 numbers, got ", momentum.size());
  STD_TORCH_CHECK(eps.size() == 3, "eps: expected 3 numbers, got ", eps.size());
  MBConv& m = call.m;
  const int64_t columns = call.norm_columns();
  if (given.has_value()) call.check(*given, "norms", {4, columns});
  torch::stable::Tensor norms =
      given.has_value() ? torch::stable::clone(*given) : call.sums({4, columns});
  call.set_norms(call.written(norms, "norms", {4, columns}), batch);
  Statistics statistics[3];
  const auto set = [&](int64_t k, const Optional& gamma, const Optional& beta, const Optional& mean,
                       const Optional& var, const Optional& batches, const char* const(&names)[5]) {
    const Norm& norm = m.norms[k];
    if (norm.channels == 0) return;
    STD_TORCH_CHECK(gamma.has_value(), names[0], ": expected [", norm.channels, "], got None");
    STD_TORCH_CHECK(beta.has_value(), names[1], ": expected [", norm.channels, "], got None");
    Statistics& s = statistics[k];
    s.gamma = call.vector(*gamma, names[0], {norm.channels});
    s.beta = call.vector(*beta, names[1], {norm.channels});
    s.momentum = momentum[size_t(k)], s.eps = eps[size_t(k)];
    const bool running = !norm.batch && !given.has_value();
    STD_TORCH_CHECK(!running || (mean.has_value() && var.has_value()), names[2], ", ", names[3],
                    ": expected running statistics, as `batch` is not set");
    if (mean.has_value()) s.mean = call.written(*mean, names[2], {norm.channels});
    if (var.has_value()) s.var = call.written(*var, names[3], {norm.channels});
    if (batches.has_value()) {
      call.check(*batches, names[4], {});
      STD_TORCH_CHECK(batches->scalar_type() == torch::headeronly::ScalarType::Long, names[4],
                      ": expected int64");
      s.batches = static_cast<int64_t*>(batches->data_ptr());
    }
  };
  set(0, gamma0, beta0, mean0, var0, batches0, {"gamma0", "beta0", "mean0", "var0", "batches0"});
  set(1, gamma1, beta1, mean1, var1, batches1, {"gamma1", "beta1", "mean1", "var1", "batches1"});
  set(2, gamma2, beta2, mean2, var2, batches2, {"gamma2", "beta2", "mean2", "var2", "batches2"});
  const Map out = call.projected(p, "p"), kept_d = call.expanded_out(d, "d");
  Workspace pieces = call.workspace(workspace);
  Backend backend(x, m.sums);
  mbconv_forward(backend, m, statistics, given.has_value(), out, kept_d, pieces);
  return norms;
}

template <class Backend>
torch::stable::Tensor mbconv_recompute_op(
    const torch::stable::Tensor& x, std::optional<int64_t> fraction_bits,
    std::optional<torch::stable::Tensor> expand, const torch::stable::Tensor& depthwise,
    std::optional<torch::stable::Tensor> squeeze, std::optional<torch::stable::Tensor> squeeze_bias,
    std::optional<torch::stable::Tensor> excite, std::optional<torch::stable::Tensor> excite_bias,
    const torch::stable::Tensor& project, const torch::stable::Tensor& norms, int64_t stride,
    int64_t chunk, const torch::stable::Tensor& p, std::optional<torch::stable::Tensor> d,
    std::optional<torch::stable::Tensor> e, const torch::stable::Tensor& workspace) {
  MBConvCall<Backend> call(x, fraction_bits, expand, depthwise, squeeze, squeeze_bias, excite,
                           excite_bias, project, stride, chunk, p, "p");
  call.set_norms(call.vector(norms, "norms", {4, call.norm_columns()}), {false, false, false});
  torch::stable::Tensor squeezed = call.sums({call.squeezed_size()});
  const Map out = call.projected(p, "p"), kept_d = call.expanded_out(d, "d");
  const Map kept_e = call.expanded_in(e, "e");
  Workspace pieces = call.workspace(workspace);
  Backend backend(x, call.m.sums);
  mbconv_recompute(backend, call.m, out, kept_d, kept_e, call.squeezed_at(squeezed.data_ptr()),
                   pieces);
  return squeezed;
}

// In the order of the forward's parameters; empty where a part is absent.
using MBConvGradients =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor>;

template <class Backend>
MBConvGradients mbconv_backward_op(
    const torch::stable::Tensor& du, std::optional<torch::stable::Tensor> sums,
    const torch::stable::Tensor& x, std::optional<int64_t> fraction_bits,
    std::optional<torch::stable::Tensor> expand, const torch::stable::Tensor& depthwise,
    std::optional<torch::stable::Tensor> squeeze, std::optional<torch::stable::Tensor> squeeze_bias,
    std::optional<torch::stable::Tensor> excite, std::optional<torch::stable::Tensor> excite_bias,
    const torch::stable::Tensor& project, const torch::stable::Tensor& norms,
    std::vector<bool> batch, std::optional<torch::stable::Tensor> keep, int64_t stride,
    int64_t chunk, std::optional<torch::stable::Tensor> p, std::optional<torch::stable::Tensor> d,
    std::optional<torch::stable::Tensor> e, std::optional<torch::stable::Tensor> squeezed,
    std::optional<torch::stable::Tensor> dz, std::optional<torch::stable::Tensor> dx, bool add,
    const torch::stable::Tensor& workspace) {
  const bool has_p = p.has_value();
  STD_TORCH_CHECK(has_p || dz.has_value(), "dz: expected a tensor, as p is not given");
  MBConvCall<Backend> call(x, fraction_bits, expand, depthwise, squeeze, squeeze_bias, excite,
                           excite_bias, project, stride, chunk, has_p ? *p : *dz,
                           has_p ? "p" : "dz");
  MBConv& m = call.m;
  call.set_norms(call.vector(norms, "norms", {4, call.norm_columns()}), batch);
  const int64_t n = m.x.n, out = m.channels();
  Cotangent cotangent;
  cotangent.du = call.cotangent(du, "du");
  if (sums.has_value()) cotangent.sums = call.vector(*sums, "sums", {2, n, out});
  if (keep.has_value()) {
    cotangent.keep.data = call.vector(*keep, "keep", {n});
    cotangent.keep.dtype = m.sums, cotangent.keep.sn = 1;
  }
  Kept kept;
  kept.p = call.projected(p, "p");
  kept.d = call.expanded_out(d, "d");
  kept.e = call.expanded_in(e, "e");
  if (squeezed.has_value() && m.squeezes()) {
    kept.squeezed = call.squeezed_at(call.vector(*squeezed, "squeezed", {call.squeezed_size()}));
  }
  const Map plane = call.expanded_out(dz, "dz");
  Map input;
  if (dx.has_value()) {
    input = call.gradient(*dx, "dx", m.x.c, m.x.h, m.x.w);
    STD_TORCH_CHECK(add || dx->is_contiguous(), "dx: expected a contiguous tensor");
  }

  const int64_t channels = m.expanded(), k = m.depthwise.size, r = m.se.hidden;
  const int64_t c0 = m.expands() ? channels : 0, c1 = m.squeezes() ? channels : 0;
  const auto shaped = [&](int64_t rows, int64_t columns) {
    return rows * columns == 0 ? call.sums({0}) : call.sums({rows, columns, 1, 1});
  };
  MBConvGradients gradients{shaped(c0, m.x.c),     call.sums({c0}),
                            call.sums({c0}),       call.sums({channels, 1, k, k}),
                            call.sums({channels}), call.sums({channels}),
                            shaped(r, c1),         call.sums({r}),
                            shaped(c1, r),         call.sums({c1}),
                            shaped(out, channels), call.sums({out}),
                            call.sums({out})};
  Gradients g;
  std::apply(
      [&](const auto&... tensors) {
        void** const to[] = {&g.expand,  &g.gamma[0], &g.beta[0], &g.depthwise, &g.gamma[1],
                             &g.beta[1], &g.w1,       &g.b1,      &g.w2,        &g.b2,
                             &g.project, &g.gamma[2], &g.beta[2]};
        size_t i = 0;
        ((*to[i++] = tensors.data_ptr()), ...);
      },
      gradients);

  Workspace pieces = call.workspace(workspace);
  Backend backend(x, m.sums);
  mbconv_backward(backend, m, cotangent, kept, plane, input, add, g, pieces);
  return gradients;
}

}  // namespace revkernels
