// The steps of an MBConv (../mbconv.h) on a Device (products.h): kernels and products, launched
// back to back.
#pragma once

#include <utility>
#include <vector>

#include "../mbconv.h"
#include "products.h"

namespace revkernels {

inline cuda::Dtype type_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return cuda::Dtype::float32;
    case DType::float64:
      return cuda::Dtype::float64;
    case DType::float16:
      return cuda::Dtype::float16;
    case DType::bfloat16:
      return cuda::Dtype::bfloat16;
    case DType::int16:
      break;
  }
  return cuda::Dtype::int16;
}

inline cuda::Map map_of(const Map& m) {
  return {m.data, m.n, m.c, m.h, m.w, m.sn, m.sc, m.sh, m.sw};
}

template <class Device>
class CudaSteps {
 public:
  static constexpr bool kReadsStreams = false;

  template <class... Arguments>
  explicit CudaSteps(DType sums, const Arguments&... device)
      : device_(device...), sums_(type_of(sums)) {}

  void convert(const Map& out, const Map& x, double unit) { copy(out, x, unit, false); }
  void scale(void* v, const void* in, int64_t count, double factor) {
    const cuda::Map from{in, 1, 1, 1, count, 0, 0, 0, 1}, to{v, 1, 1, 1, count, 0, 0, 0, 1};
    cuda::convert(sums_, from, sums_, to, factor, false, device_.stream);
  }

  // --- convolutions ---------------------------------------------------------------------------

  void pointwise(const Map& y, const Map& x, const Matrix& w, const Affine& affine,
                 const void* gate, bool add) {
    const cuda::Dtype dtype = type_of(x.dtype);
    const cuda::Matrices matrix = matrix_of(w, dtype);
    const cuda::Norm prologue = norm(affine, gate);
    if (y.dtype == x.dtype && cuda::is_dense(map_of(y))) {
      cuda::pointwise(device_, dtype, map_of(y), map_of(x), matrix, prologue, add);
    } else {
      const Piece product(device_, x.dtype, y.n, y.c, y.h, y.w);
      cuda::pointwise(device_, dtype, map_of(product.map), map_of(x), matrix, prologue, false);
      copy(y, product.map, 1, add);
    }
  }

  void pointwise_grad_weight(void* dw, const Map& x, const Map& dy, const Affine& affine,
                             const void* gate, bool add) {
    cuda::pointwise_grad_weight(device_, type_of(x.dtype), dw, map_of(x), map_of(dy),
                                norm(affine, gate), add);
  }

  // Of p = W z, z = gate h(BN(d)): dw (+)= dp z^T, and the sums of dz over d's pixels, with z in
  // the same pass over d.
  void project_grad(void* dw, const Map& d, const Map& dp, const Map& dz, const Norm& norm,
                    const void* gate, void* sums, int64_t stride, bool add) {
    const Memory parts = partial(d, 5);
    const cuda::Dtype dtype = type_of(d.dtype);
    const cuda::Norm with_gate = this->norm(norm.affine(), gate);
    const auto write = [&](const cuda::Map& some, int64_t begin, const cuda::Output& z) {
      const int64_t sums_begin = begin * d.c * cuda::bytes_of(sums_);
      cuda::bn_act_grad_sums(dtype, map_of(rows(dz, begin, some.n)), some,
                             cuda::rows(with_gate, dtype, begin, d.c), norm.mean, parts.data(),
                             static_cast<char*>(sums) + sums_begin, stride, &z, device_.stream);
    };
    cuda::pointwise_grad_weight(device_, dtype, dw, map_of(d), map_of(dp), false, write, add);
  }

  void depthwise(const Map& y, const Map& x, const Filter& f, const Affine& affine) {
    cuda::depthwise_conv(type_of(x.dtype), map_of(x), filter(f, x), {affine.scale, affine.shift},
                         y.data, device_.stream);
  }

  // dx (+)= the transpose of dy, by way of `spare`, where that is there, if no kernel writes dx.
  void depthwise_grad_input(const Map& dx, const Map& dy, const Filter& f, bool add,
                            const Map& spare) {
    const auto run = [&](const Map& to, bool add) {
      cuda::depthwise_conv_grad_input(type_of(dy.dtype), map_of(dy), filter(f, dy),
                                      {to.data, to.sn, to.sc}, to.h, to.w, add, device_.stream);
    };
    if (dx.dtype == dy.dtype && cuda::is_dense(map_of(dx))) return run(dx, add);
    const bool spared = spare.data != nullptr;
    const Piece piece = spared ? Piece{} : Piece(device_, dy.dtype, dx.n, dx.c, dx.h, dx.w);
    const Map& gradient = spared ? spare : piece.map;
    run(gradient, false);
    copy(dx, gradient, 1, add);
  }

  void depthwise_grad_weight(void* dw, const Map& x, const Map& dy, const Filter& f,
                             const Affine& affine, bool add, void*) {
    const cuda::Dtype dtype = type_of(x.dtype);
    const int64_t slices = cuda::grad_weight_slices(dtype, map_of(dy), f.size, f.stride);
    const int64_t taps = f.channels * f.size * f.size;
    const auto sums = device_.allocate((slices + 1) * taps * cuda::bytes_of(sums_));
    void* total = sums.data();
    void* partial = static_cast<char*>(total) + taps * cuda::bytes_of(sums_);
    void* out = add ? total : dw;
    cuda::depthwise_conv_grad_weight(dtype, map_of(x), map_of(dy), {affine.scale, affine.shift},
                                     f.size, f.stride, slices == 1 ? out : partial, out,
                                     device_.stream);
    if (add) cuda::fold_parts(sums_, total, 1, 1, taps, dw, taps, true, device_.stream);
  }

  // --- batch normalisation --------------------------------------------------------------------

  void moments(const Map& x, double* moments) {
    cuda::bn_moments(type_of(x.dtype), map_of(x), moments, device_.stream);
  }

  void fold(const double* moments, int64_t n, int64_t area, const Statistics& s, const Norm& norm) {
    const cuda::Fold to = fold_of(s, norm, n * area);
    cuda::bn_merge(sums_, moments, n, norm.channels, area, norm.mean, nullptr, &to, device_.stream);
  }

  void statistics(const Map& x, double* moments, const Statistics& s, const Norm& norm) {
    const cuda::Fold to = fold_of(s, norm, x.n * x.h * x.w);
    cuda::bn_statistics(type_of(x.dtype), map_of(x), moments, norm.mean, nullptr, &to,
                        device_.stream);
  }

  void fold_running(const Statistics& s, const Norm& norm) {
    cuda::Fold to = fold_of(s, norm, 1);
    to.running_mean = to.running_var = nullptr, to.batches = nullptr;
    to.mean = norm.mean;
    cuda::bn_fold(sums_, norm.channels, s.mean, s.var, to, device_.stream);
  }

  void fold_grad(const NormPull& pull) {
    cuda::bn_fold_grad(sums_, fold_grad_of(pull), device_.stream);
  }

  void act_grad_sums(const Map& dz, const Map& x, const Norm& norm, void* sums, int64_t stride) {
    const Memory parts = partial(x, 5);
    cuda::bn_act_grad_sums(type_of(x.dtype), map_of(dz), map_of(x),
                           this->norm(norm.affine(), nullptr), norm.mean, parts.data(), sums,
                           stride, nullptr, device_.stream);
  }

  // The map on the samples from `begin` on.
  void act_grad(const Map& dx, const Map& dz, const Map& x, const NormPull& pull, int64_t begin) {
    const Coefficient gate = rows(pull.gate, begin), dpool = rows(pull.dpool, begin);
    const NormGradient& g = pull.gradient;
    cuda::Norm n = norm(pull.norm.affine(), pull.act);
    n.gate = gate.data, n.gate_stride_n = gate.sn, n.gate_stride_c = gate.sc;
    cuda::bn_act_grad(type_of(x.dtype), type_of(dz.dtype), map_of(dz), map_of(x), n,
                      {dpool.data, g.slope, g.offset}, {dx.data, dx.sn, dx.sc}, device_.stream);
  }

  // Fold and map, with `sums` to be computed first where they are given.
  void norm_grad(const Map& dx, const Map& dz, const Map& x, const NormPull& pull, void* sums) {
    const Memory parts = sums != nullptr ? partial(x, pull.five() ? 5 : 2) : Memory();
    cuda::bn_grad(type_of(x.dtype), type_of(dz.dtype), map_of(dz), map_of(x),
                  norm(pull.norm.affine(), pull.act), fold_grad_of(pull), sums, parts.data(),
                  {dx.data, dx.sn, dx.sc}, device_.stream);
  }

  void coupling_sums(const Map& du, const Map& p, const Norm& norm, void* sums, int64_t stride) {
    const Memory parts = partial(p, 2);
    cuda::coupling_sums(type_of(p.dtype), type_of(du.dtype), map_of(du), map_of(p), norm.mean,
                        parts.data(), sums, stride, device_.stream);
  }

  // --- squeeze-excite -------------------------------------------------------------------------

  void squeeze(const Map& d, const Affine& affine, void* pooled) {
    const Memory parts = partial(d, 1);
    cuda::bn_act_squeeze(type_of(d.dtype), map_of(d), norm(affine, nullptr), parts.data(), pooled,
                         device_.stream);
  }

  void gate(const SqueezeExcite& se, int64_t n, const Squeezed& s, void*) {
    cuda::se_gate(sums_, layers(se, n), s.pooled, s.hidden, s.gate, device_.stream);
  }

  // p = W z, z = gate h(BN(d)), gate = SE(mean_hw h(BN(d))), with z in the pass that has the gate.
  void squeeze_project(const Map& p, const Map& d, const Matrix& w, const Affine& affine,
                       const SqueezeExcite& se, const Squeezed& s, void*) {
    const Memory parts = partial(d, 1);
    const cuda::Dtype dtype = type_of(d.dtype);
    const auto write = [&](const cuda::Map& x, int64_t, const cuda::Output& z) {
      cuda::se_gate_act(dtype, x, norm(affine, nullptr), layers(se, x.n), parts.data(), s.pooled,
                        s.hidden, s.gate, z, device_.stream);
    };
    cuda::pointwise(device_, dtype, map_of(p), map_of(d), matrix_of(w, dtype), false, write, false);
  }

  void gate_grad(const SqueezeExcite& se, int64_t n, const void* dgate, const Squeezed& s,
                 int64_t area, void* dpool, const Gradients& g, void* scratch) {
    cuda::se_gate_grad(sums_, layers(se, n), dgate, s.gate, s.hidden, s.pooled, area,
                       {scratch, dpool, g.w1, g.b1, g.w2, g.b2}, device_.stream);
  }

 private:
  using Memory = typename Device::Memory;

  // A plane of its own.
  struct Piece {
    Memory memory;
    Map map;

    Piece() = default;
    Piece(const Device& device, DType dtype, int64_t n, int64_t c, int64_t h, int64_t w)
        : memory(device.allocate(n * c * h * w * revkernels::bytes_of(dtype))),
          map{memory.data(), dtype, n, c, h, w, c * h * w, h * w, w, 1} {}
  };

  // Room for `count` sums of every plane in parts, where planes are large.
  Memory partial(const Map& x, int64_t count) const {
    const int64_t parts = cuda::plane_parts(map_of(x));
    if (parts == 1) return {};
    return device_.allocate(parts * count * x.n * x.c * cuda::bytes_of(sums_));
  }

  // y (+)= factor x, through the sums' type where no kernel converts at once.
  void copy(const Map& y, const Map& x, double factor, bool add) {
    const cuda::Dtype from = type_of(x.dtype), to = type_of(y.dtype);
    if (cuda::converts(from, to)) {
      cuda::convert(from, map_of(x), to, map_of(y), factor, add, device_.stream);
    } else {
      const Piece wide(device_, DType::float32, x.n, x.c, x.h, x.w);
      cuda::convert(from, map_of(x), sums_, map_of(wide.map), factor, false, device_.stream);
      cuda::convert(sums_, map_of(wide.map), to, map_of(y), 1, add, device_.stream);
    }
  }

  cuda::Matrices matrix_of(const Matrix& w, cuda::Dtype dtype) {
    const int64_t row = w.transposed ? 1 : w.columns, column = w.transposed ? w.rows : 1;
    return {cast(w, dtype), 1, w.rows, w.columns, 0, row, column};
  }

  // The weight in the planes' type, converted once per call of an op.
  const void* cast(const Matrix& w, cuda::Dtype dtype) {
    if (dtype == sums_) return w.data;
    for (const auto& [data, memory] : casts_) {
      if (data == w.data) return memory.data();
    }
    const int64_t count = w.rows * w.columns;
    Memory memory = device_.allocate(count * cuda::bytes_of(dtype));
    const cuda::Map from{w.data, 1, 1, 1, count, 0, 0, 0, 1};
    const cuda::Map to{memory.data(), 1, 1, 1, count, 0, 0, 0, 1};
    cuda::convert(sums_, from, dtype, to, 1, false, device_.stream);
    casts_.emplace_back(w.data, std::move(memory));
    return casts_.back().second.data();
  }

  cuda::Filter filter(const Filter& f, const Map& x) const {
    return {f.data, type_of(x.dtype) != sums_, f.size, f.stride};
  }

  static cuda::Norm norm(const Affine& affine, const void* gate) {
    return {affine.scale, affine.shift, gate,
            affine.scale ? Activation::hardswish : Activation::identity};
  }
  static cuda::Norm norm(const Affine& affine, Activation act) {
    return {affine.scale, affine.shift, nullptr, act};
  }

  static cuda::FoldGrad fold_grad_of(const NormPull& p) {
    const NormGradient& g = p.gradient;
    return {p.sums,       p.samples * p.norm.channels,
            p.five(),     p.gate.data,
            p.gate.sn,    p.gate.sc,
            p.dpool.data, p.norm.mean,
            p.norm.rstd,  p.norm.scale,
            p.samples,    p.norm.channels,
            p.count,      p.norm.batch,
            g.gamma,      g.beta,
            g.slope,      g.offset};
  }

  static cuda::SqueezeExcite layers(const SqueezeExcite& se, int64_t n) {
    return {se.w1, se.b1, se.w2, se.b2, n, se.channels, se.hidden};
  }

  static cuda::Fold fold_of(const Statistics& s, const Norm& norm, int64_t count) {
    return {s.gamma, s.beta, s.mean,    s.var,      s.batches, s.momentum,
            s.eps,   count,  norm.rstd, norm.scale, norm.shift};
  }

  Device device_;
  cuda::Dtype sums_;
  std::vector<std::pair<const void*, Memory>> casts_;
};

}  // namespace revkernels
