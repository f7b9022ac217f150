// The steps of an MBConv on the CPU: a Backend of the kernels in kernels.h.
#pragma once

#include <cmath>
#include <vector>

#include "../mbconv.h"
#include "kernels.h"
#include "pointwise.h"
#include "tensors.h"

namespace revkernels {

class CpuBackend {
 public:
  static constexpr bool kReadsStreams = true;
  static constexpr const char* kDevice = "CPU";
  static bool is_here(const Tensor& t) { return t.is_cpu(); }

  CpuBackend(const Tensor&, DType sums) : sums_(sums), wide_(sums == DType::float64) {}

  // --- convolutions ---------------------------------------------------------------------------

  void pointwise(const Map& y, const Map& x, const Matrix& w, const Affine& affine,
                 const void* gate, bool add) const {
    PointwiseArgs args = pointwise_args(x, y, affine, gate);
    args.weight = w.data;
    args.weight_row = w.transposed ? 1 : w.columns;
    args.weight_column = w.transposed ? w.rows : 1;
    args.add = add;
    run_pointwise(args);
  }

  // y = scale W z + shift, of the `finish`, plus y with `add`.
  void project(const Map& y, const Map& z, const Matrix& w, const Affine& affine, const void* gate,
               const Affine& finish, bool add) const {
    PointwiseArgs args = pointwise_args(z, y, affine, gate);
    args.weight = w.data;
    args.weight_row = w.columns, args.weight_column = 1;
    args.out_scale = per_channel(finish.scale);
    args.out_shift = per_channel(finish.shift);
    args.add = add;
    run_pointwise(args);
  }

  void pointwise_grad_weight(void* dw, const Map& x, const Map& dy, const Affine& affine,
                             const void* gate, bool add) const {
    PointwiseArgs args = pointwise_args(x, dy, affine, gate);
    args.grad_weight = dw;
    args.add = add;
    run_pointwise_grad_weight(args);
  }

  // Of p = W z, z = gate h(BN(d)): dw (+)= dp z^T, and the sums of dz over d's pixels.
  void project_grad(void* dw, const Map& d, const Map& dp, const Map& dz, const Norm& norm,
                    const void* gate, void* sums, int64_t stride, bool add) const {
    pointwise_grad_weight(dw, d, dp, norm.affine(), gate, add);
    act_grad_sums(dz, d, norm, sums, stride);
  }

  void depthwise(const Map& y, const Map& x, const Filter& f, const Affine& affine) const {
    DepthwiseArgs args = depthwise_args(x, f);
    args.out = y;
    set_prologue(args, affine);
    const int64_t work = numel(x) + numel(y) * f.size * f.size / 16;
    run(kernels().depthwise, args, x.n * x.c, work);
  }

  // dx (+)= the transpose of dy; to be added by way of `spare`.
  void depthwise_grad_input(const Map& dx, const Map& dy, const Filter& f, bool add,
                            const Map& spare) const {
    DepthwiseArgs args = depthwise_args(dy, f);
    args.out = add ? spare : dx;
    const int64_t work = numel(dx) + numel(dy) * f.size * f.size / 16;
    run(kernels().depthwise_grad_input, args, dy.n * dy.c, work);
    if (add) this->add(dx, spare);
  }

  // Samples within a group, then the groups, in an order that no thread count changes.
  void depthwise_grad_weight(void* dw, const Map& x, const Map& dy, const Filter& f,
                             const Affine& affine, bool add, void* partial) const {
    DepthwiseArgs args = depthwise_args(x, f);
    args.dy = dy;
    set_prologue(args, affine);
    const int64_t taps = f.size * f.size, size = f.channels * taps;
    const int64_t groups = ceil_div(x.n, kSamplesPerPartial);
    args.partial = add || groups > 1 ? partial : dw;
    run(kernels().depthwise_grad_weight, args, groups * x.c, numel(x) + numel(dy) * taps / 16);
    if (args.partial == dw) return;
    as_sums([&](auto zero) {
      using A = decltype(zero);
      A* out = static_cast<A*>(dw);
      const A* in = static_cast<const A*>(partial);
      if (!add) std::fill(out, out + size, zero);
      for (int64_t g = 0; g < groups; ++g, in += size) {
        for (int64_t i = 0; i < size; ++i) out[i] += in[i];
      }
    });
  }

  // --- batch normalisation --------------------------------------------------------------------

  void moments(const Map& x, double* moments) const {
    NormArgs args;
    args.x = x;
    args.wide = wide_;
    args.moments = moments;
    run_planes(kernels().bn_moments, args, 1);
  }

  // Chan's formula over the samples, in order; every plane has the same number of values.
  void fold(const double* moments, int64_t n, int64_t area, const Statistics& s,
            const Norm& norm) const {
    const double count = double(n * area);
    as_sums([&](auto zero) {
      using A = decltype(zero);
      for (int64_t c = 0; c < norm.channels; ++c) {
        double mean = 0, m2 = 0;
        for (int64_t i = 0; i < n; ++i) {
          const double* plane = moments + 2 * (i * norm.channels + c);
          const double delta = plane[0] - mean;
          mean += delta / double(i + 1);
          m2 += plane[1] + delta * delta * double(area) * double(i) / double(i + 1);
        }
        const A m = A(mean), var = A(m2 / count);
        fold_channel<A>(s, norm, c, m, var);
        const auto move = [&](void* running, double to) {
          if (running == nullptr) return;
          A& r = static_cast<A*>(running)[c];
          r = A(r + s.momentum * (to - r));
        };
        move(s.mean, m);
        move(s.var, var * (count / (count - 1)));
      }
    });
    if (s.batches != nullptr) ++*s.batches;
  }

  void statistics(const Map& x, double* moments, const Statistics& s, const Norm& norm) const {
    this->moments(x, moments);
    fold(moments, x.n, x.h * x.w, s, norm);
  }

  void fold_running(const Statistics& s, const Norm& norm) const {
    as_sums([&](auto zero) {
      using A = decltype(zero);
      for (int64_t c = 0; c < norm.channels; ++c) {
        fold_channel<A>(s, norm, c, static_cast<const A*>(s.mean)[c],
                        static_cast<const A*>(s.var)[c]);
      }
    });
  }

  void fold_grad(const NormPull& pull) const {
    const Norm& norm = pull.norm;
    const int64_t n = pull.samples, channels = norm.channels;
    as_sums([&](auto zero) {
      using A = decltype(zero);
      const A* row = static_cast<const A*>(pull.sums) + pull.five() * n * channels;
      const A* by = static_cast<const A*>(pull.gate.data);
      const A* pool = static_cast<const A*>(pull.dpool.data);
      std::vector<double> totals(size_t(2 * channels));
      double *total = totals.data(), *centred = total + channels;
      for (int64_t i = 0; i < n; ++i, row += channels) {
        const A* product = row + n * channels;
        for (int64_t c = 0; c < channels; ++c) {
          const double g = by ? by[i * pull.gate.sn + c * pull.gate.sc] : A(1);
          total[c] += g * row[c], centred[c] += g * product[c];
        }
        if (pool == nullptr) continue;
        const A *slopes = product + n * channels, *slope_products = slopes + n * channels;
        for (int64_t c = 0; c < channels; ++c) {
          const double g = pool[i * channels + c];
          total[c] += g * slopes[c], centred[c] += g * slope_products[c];
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        const double scale = static_cast<const A*>(norm.scale)[c];
        const double rstd = static_cast<const A*>(norm.rstd)[c];
        const double mean = static_cast<const A*>(norm.mean)[c];
        const double d = rstd * centred[c], k = norm.batch ? -scale / double(pull.count) : 0;
        static_cast<A*>(pull.gradient.gamma)[c] = A(d);
        static_cast<A*>(pull.gradient.beta)[c] = A(total[c]);
        static_cast<A*>(pull.gradient.slope)[c] = A(k * rstd * d);
        static_cast<A*>(pull.gradient.offset)[c] = A(k * total[c] - k * rstd * d * mean);
      }
    });
  }

  void act_grad_sums(const Map& dz, const Map& x, const Norm& norm, void* sums,
                     int64_t stride) const {
    NormArgs args = norm_args(x, norm.affine());
    args.dz = dz;
    args.mean = per_channel(norm.mean);
    args.sums = sums;
    args.sums_stride = stride;
    args.act = Activation::hardswish;
    run_planes(kernels().bn_act_grad_sums, args, 2);
  }

  // The map on the samples from `begin` on.
  void act_grad(const Map& dx, const Map& dz, const Map& x, const NormPull& pull,
                int64_t begin) const {
    const Norm& norm = pull.norm;
    NormArgs args = norm_args(x, norm.affine());
    args.dz = dz;
    args.out = dx;
    args.gate = rows(pull.gate, begin);
    args.dpool = rows(pull.dpool, begin);
    args.slope = per_channel(norm.batch ? pull.gradient.slope : nullptr);
    args.offset = per_channel(norm.batch ? pull.gradient.offset : nullptr);
    args.act = pull.act;
    run_planes(kernels().bn_act_grad, args, 2);
  }

  // Fold and map, with `sums` to be computed first where they are given.
  void norm_grad(const Map& dx, const Map& dz, const Map& x, const NormPull& pull,
                 void* sums) const {
    if (sums != nullptr) {
      pull.five() ? act_grad_sums(dz, x, pull.norm, sums, x.n * x.c)
                  : coupling_sums(dz, x, pull.norm, sums, x.n * x.c);
    }
    fold_grad(pull);
    act_grad(dx, dz, x, pull, 0);
  }

  // --- coupling -------------------------------------------------------------------------------

  void coupling_sums(const Map& du, const Map& p, const Norm& norm, void* sums,
                     int64_t stride) const {
    Gather term;
    term.p = p;
    term.center = per_channel(norm.mean);
    term.sums = sums;
    term.sums_stride = stride;
    CoupleAdjointArgs args;
    args.dy = du;
    args.terms = &term;
    args.count = 1;
    args.wide = wide_;
    run(kernels().couple_adjoint, args, du.n * du.c, 2 * numel(du));
  }

  void add(const Map& y, const Map& x) const {
    Contribution term;
    term.p = x;
    CoupleArgs args;
    args.y = y;
    args.terms = &term;
    args.count = 1;
    args.wide = wide_;
    run(kernels().couple, args, y.n * y.c, 2 * numel(y));
  }

  // y <- [y +] up_f(scale p + shift)
  void upsample(const Map& y, const Map& p, const Affine& affine, int64_t factor, Upsampling mode,
                bool assign) const {
    Contribution term;
    term.p = p;
    term.scale = per_channel(affine.scale), term.shift = per_channel(affine.shift);
    term.factor = factor;
    CoupleArgs args;
    args.y = y;
    args.terms = &term;
    args.count = 1;
    args.mode = mode;
    args.assign = assign;
    args.wide = wide_;
    run(kernels().couple, args, y.n * y.c, 2 * numel(y));
  }

  // --- squeeze-excite -------------------------------------------------------------------------

  void squeeze(const Map& d, const Affine& affine, void* pooled) const {
    NormArgs args = norm_args(d, affine);
    args.sums = pooled;
    args.act = Activation::hardswish;
    run_planes(kernels().bn_act_squeeze, args, 1);
  }

  void gate(const SqueezeExcite& se, int64_t n, const Squeezed& s, void* active) const {
    run_layer(n, s.pooled, se.channels, se.w1, se.b1, s.hidden, se.hidden, active, false);
    run_layer(n, active, se.hidden, se.w2, se.b2, s.gate, se.channels, nullptr, true);
  }

  // p = W z, z = gate h(BN(d)), gate = SE(mean_hw h(BN(d))); active: [N, R].
  void squeeze_project(const Map& p, const Map& d, const Matrix& w, const Affine& affine,
                       const SqueezeExcite& se, const Squeezed& s, void* active) const {
    squeeze(d, affine, s.pooled);
    gate(se, d.n, s, active);
    pointwise(p, d, w, affine, s.gate, false);
  }

  // scratch: [N, E + 2 R]. dpool comes out per pixel of a map of `area`.
  void gate_grad(const SqueezeExcite& se, int64_t n, const void* dgate, const Squeezed& s,
                 int64_t area, void* dpool, const Gradients& gradients, void* scratch) const {
    const int64_t c = se.channels, r = se.hidden, item = bytes_of(sums_);
    void* dv = scratch;
    void* active = static_cast<char*>(dv) + n * c * item;
    void* dhidden = static_cast<char*>(active) + n * r * item;
    GateSlopeArgs args;
    args.dgate = dgate, args.gate = s.gate, args.hidden = s.hidden;
    args.dv = dv, args.active = active;
    args.gates = n * c, args.hiddens = n * r;
    args.wide = wide_;
    const int64_t elements = std::max(args.gates, args.hiddens);
    run(kernels().gate_slopes, args, ceil_div(elements, kGateSegment), elements);
    multiply(dhidden, dv, false, se.w2, n, c, r, s.hidden);
    multiply(dpool, dhidden, false, se.w1, n, r, c, nullptr);
    multiply(gradients.w1, dhidden, true, s.pooled, r, n, c, nullptr);
    sum_rows(gradients.b1, dhidden, n, r);
    multiply(gradients.w2, dv, true, active, c, n, r, nullptr);
    sum_rows(gradients.b2, dv, n, c);
    as_sums([&](auto zero) {
      using A = decltype(zero);
      for (int64_t i = 0; i < n * c; ++i) static_cast<A*>(dpool)[i] /= A(area);
    });
  }

  void scale(void* out, const void* in, int64_t count, double factor) const {
    as_sums([&](auto zero) {
      using A = decltype(zero);
      for (int64_t i = 0; i < count; ++i) {
        static_cast<A*>(out)[i] = static_cast<const A*>(in)[i] * A(factor);
      }
    });
  }

 private:
  template <class Body>
  void as_sums(const Body& body) const {
    wide_ ? body(double(0)) : body(float(0));
  }

  Coefficient per_channel(const void* data) const {
    Coefficient v;
    v.data = data, v.dtype = sums_, v.sc = 1;
    return v;
  }

  template <class A>
  static void fold_channel(const Statistics& s, const Norm& norm, int64_t c, A mean, A var) {
    const A rstd = A(1 / std::sqrt(double(var) + s.eps));
    const A scale = A(double(static_cast<const A*>(s.gamma)[c]) * double(rstd));
    static_cast<A*>(norm.mean)[c] = mean;
    static_cast<A*>(norm.rstd)[c] = rstd;
    static_cast<A*>(norm.scale)[c] = scale;
    static_cast<A*>(norm.shift)[c] =
        A(double(static_cast<const A*>(s.beta)[c]) - double(mean) * double(scale));
  }

  NormArgs norm_args(const Map& x, const Affine& affine) const {
    NormArgs args;
    args.x = x;
    args.scale = per_channel(affine.scale);
    args.shift = per_channel(affine.shift);
    args.wide = wide_;
    return args;
  }

  static void run_planes(void (*kernel)(const NormArgs&, int64_t, int64_t), const NormArgs& args,
                         int64_t maps) {
    run(kernel, args, args.x.n * args.x.c, numel(args.x) * maps);
  }

  PointwiseArgs pointwise_args(const Map& x, const Map& y, const Affine& affine,
                               const void* gate) const {
    PointwiseArgs args;
    args.x = x;
    args.y = y;
    args.scale = per_channel(affine.scale);
    args.shift = per_channel(affine.shift);
    args.gate = per_channel(gate);
    args.gate.sn = x.c;
    args.wide = wide_;
    return args;
  }

  DepthwiseArgs depthwise_args(const Map& in, const Filter& f) const {
    DepthwiseArgs args;
    args.in = in;
    args.weight = f.data;
    args.kernel = f.size;
    args.stride = f.stride;
    args.wide = wide_;
    return args;
  }

  void set_prologue(DepthwiseArgs& args, const Affine& affine) const {
    args.scale = per_channel(affine.scale);
    args.shift = per_channel(affine.shift);
  }

  // out [n, rows] = f(in [n, width] weight^T + bias), f the identity or hardsigmoid.
  void run_layer(int64_t n, const void* in, int64_t width, const void* weight, const void* bias,
                 void* out, int64_t rows, void* active, bool hardsigmoid) const {
    LayerArgs args;
    args.in = in, args.weight = weight, args.bias = bias, args.out = out, args.active = active;
    args.n = n, args.width = width, args.rows = rows;
    args.hardsigmoid = hardsigmoid;
    args.wide = wide_;
    run(kernels().layer, args, ceil_div(rows, kDotRows), n * rows * width / kProductsPerElement);
  }

  // out [rows, columns] = left right, or left^T right, with `depth` terms; times
  // hardswish'(hidden).
  void multiply(void* out, const void* left, bool transposed, const void* right, int64_t rows,
                int64_t depth, int64_t columns, const void* hidden) const {
    ProductArgs args;
    args.left = left, args.right = right, args.hidden = hidden, args.out = out;
    args.rows = rows, args.depth = depth, args.columns = columns;
    args.left_row = transposed ? 1 : depth;
    args.left_column = transposed ? rows : 1;
    args.wide = wide_;
    run(kernels().product, args, ceil_div(columns, kColumnBlock),
        rows * columns * (depth / kProductsPerElement + 1));
  }

  // The product with a row of ones.
  void sum_rows(void* out, const void* in, int64_t rows, int64_t columns) const {
    static const float one = 1;
    static const double wide_one = 1;
    ProductArgs args;
    args.left = wide_ ? static_cast<const void*>(&wide_one) : &one;
    args.right = in, args.out = out;
    args.rows = 1, args.depth = rows, args.columns = columns;
    args.wide = wide_;
    run(kernels().product, args, ceil_div(columns, kColumnBlock), rows * columns);
  }

  DType sums_;
  bool wide_;
};

}  // namespace revkernels
