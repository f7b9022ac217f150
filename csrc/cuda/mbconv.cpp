// The three ops of an MBConv on CUDA: a Backend of the kernels in kernels.h and of cuBLAS, launched
// back to back on the current stream.
#include "../mbconv_ops.h"
#include "products.h"

namespace revkernels {
namespace {

cuda::Dtype type_of(DType dtype) {
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

cuda::Map map_of(const Map& m) { return {m.data, m.n, m.c, m.h, m.w, m.sn, m.sc, m.sh, m.sw}; }

bool is_contiguous(const Map& m) {
  const cuda::Map c = map_of(m);
  return cuda::is_dense(c) && (m.c == 1 || m.sc == m.h * m.w) &&
         (m.n == 1 || m.sn == m.c * m.h * m.w);
}

class CudaBackend {
 public:
  using Tensor = torch::stable::Tensor;

  static constexpr bool kReadsStreams = false;
  static constexpr const char* kDevice = "CUDA";
  static bool is_here(const Tensor& t) { return t.is_cuda(); }

  CudaBackend(const Tensor& like, DType sums)
      : like_(like), guard_(like.get_device_index()), sums_(type_of(sums)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_));
  }

  void convert(const Map& out, const Map& x, double unit) { copy(out, x, unit, false); }
  void add(const Map& y, const Map& x) { copy(y, x, 1, true); }
  void scale(void* v, const void* in, int64_t count, double factor) {
    const cuda::Map from{in, 1, 1, 1, count, 0, 0, 0, 1}, to{v, 1, 1, 1, count, 0, 0, 0, 1};
    cuda::convert(sums_, from, sums_, to, factor, false, stream_);
    check();
  }

  // --- convolutions ---------------------------------------------------------------------------

  void pointwise(const Map& y, const Map& x, const Matrix& w, const Affine& affine,
                 const void* gate, bool add) {
    const cuda::Dtype dtype = type_of(x.dtype);
    const int64_t row = w.transposed ? 1 : w.columns, column = w.transposed ? w.rows : 1;
    const cuda::Matrices matrix{cast(w, dtype), 1, w.rows, w.columns, 0, row, column};
    const cuda::Norm prologue = norm(affine, gate);
    if (y.dtype == x.dtype && cuda::is_dense(map_of(y))) {
      cuda::pointwise(like_, dtype, map_of(y), map_of(x), matrix, prologue, add, stream_);
    } else {
      const Piece product(*this, x.dtype, y.n, y.c, y.h, y.w);
      cuda::pointwise(like_, dtype, map_of(product.map), map_of(x), matrix, prologue, false,
                      stream_);
      copy(y, product.map, 1, add);
    }
    check();
  }

  void pointwise_grad_weight(void* dw, const Map& x, const Map& dy, const Affine& affine,
                             const void* gate, bool add) {
    cuda::pointwise_grad_weight(like_, type_of(x.dtype), dw, map_of(x), map_of(dy),
                                norm(affine, gate), add, stream_);
    check();
  }

  void depthwise(const Map& y, const Map& x, const Filter& f, const Affine& affine) {
    cuda::depthwise_conv(type_of(x.dtype), map_of(x), filter(f, x), {affine.scale, affine.shift},
                         y.data, stream_);
    check();
  }

  void depthwise_grad_input(const Map& dv, const Map& dy, const Filter& f) {
    const auto run = [&](const Map& to) {
      cuda::depthwise_conv_grad_input(type_of(dy.dtype), map_of(dy), filter(f, dy), to.data, to.h,
                                      to.w, stream_);
    };
    if (dv.dtype == dy.dtype && is_contiguous(dv)) {
      run(dv);
    } else {
      const Piece gradient(*this, dy.dtype, dv.n, dv.c, dv.h, dv.w);
      run(gradient.map);
      copy(dv, gradient.map, 1, false);
    }
    check();
  }

  void depthwise_grad_weight(void* dw, const Map& x, const Map& dy, const Filter& f,
                             const Affine& affine, bool add, void*) {
    const cuda::Dtype dtype = type_of(x.dtype);
    const int64_t slices = cuda::grad_weight_slices(dtype, map_of(dy), f.size, f.stride);
    const int64_t taps = f.channels * f.size * f.size;
    const Tensor sums = torch::stable::new_empty(like_, {slices + 1, taps}, sums_type());
    char* total = static_cast<char*>(sums.mutable_data_ptr());
    char* partial = slices == 1 ? total : total + taps * int64_t(sums.element_size());
    void* out = add ? total : dw;
    cuda::depthwise_conv_grad_weight(dtype, map_of(x), map_of(dy), {affine.scale, affine.shift},
                                     f.size, f.stride, slices == 1 ? out : partial, out, stream_);
    if (add) cuda::fold_parts(sums_, total, 1, 1, taps, dw, taps, true, stream_);
    check();
  }

  // --- batch normalisation --------------------------------------------------------------------

  void moments(const Map& x, double* moments) {
    cuda::bn_moments(type_of(x.dtype), map_of(x), moments, stream_);
    check();
  }

  void fold(const double* moments, int64_t n, int64_t area, const Statistics& s, const Norm& norm) {
    const cuda::Fold to = fold_of(s, norm, n * area);
    cuda::bn_merge(sums_, moments, n, norm.channels, area, norm.mean, nullptr, &to, stream_);
    check();
  }

  void fold_running(const Statistics& s, const Norm& norm) {
    cuda::Fold to = fold_of(s, norm, 1);
    to.running_mean = to.running_var = nullptr, to.batches = nullptr;
    to.mean = norm.mean;
    cuda::bn_fold(sums_, norm.channels, s.mean, s.var, to, stream_);
    check();
  }

  void fold_grad(const void* sums, int64_t count_of_sums, int64_t n, const Norm& norm,
                 const Coefficient& gate, const void* dpool, int64_t count,
                 const NormGradient& gradient) {
    cuda::bn_fold_grad(sums_,
                       {sums, n * norm.channels, count_of_sums == 5, gate.data, gate.sn, gate.sc,
                        dpool, norm.mean, norm.rstd, norm.scale, n, norm.channels, count,
                        norm.batch, gradient.gamma, gradient.beta, gradient.slope, gradient.offset},
                       stream_);
    check();
  }

  void act_grad_sums(const Map& dz, const Map& x, const Affine& affine, const void* mean,
                     void* sums, int64_t stride) {
    const Partial partial(*this, x, 5);
    cuda::bn_act_grad_sums(type_of(x.dtype), map_of(dz), map_of(x), norm(affine, nullptr), mean,
                           partial.data(), sums, stride, stream_);
    check();
  }

  void act_grad(const Map& out, const Map& dz, const Map& x, const Affine& affine,
                const Coefficient& gate, const Coefficient& dpool, const void* slope,
                const void* offset, Activation act) {
    cuda::Norm n{affine.scale, affine.shift, gate.data, act, gate.sn, gate.sc};
    cuda::bn_act_grad(type_of(x.dtype), type_of(dz.dtype), map_of(dz), map_of(x), n,
                      {dpool.data, slope, offset}, {out.data, out.sn, out.sc}, stream_);
    check();
  }

  void coupling_sums(const Map& du, const Map& p, const void* mean, void* sums, int64_t stride) {
    const Partial partial(*this, p, 2);
    cuda::coupling_sums(type_of(p.dtype), type_of(du.dtype), map_of(du), map_of(p), mean,
                        partial.data(), sums, stride, stream_);
    check();
  }

  // --- squeeze-excite -------------------------------------------------------------------------

  void squeeze(const Map& d, const Affine& affine, void* pooled) {
    const Partial partial(*this, d, 1);
    cuda::bn_act_squeeze(type_of(d.dtype), map_of(d), norm(affine, nullptr), partial.data(), pooled,
                         stream_);
    check();
  }

  void gate(const SqueezeExcite& se, int64_t n, const Squeezed& s, void*) {
    cuda::se_gate(sums_, layers(se, n), s.pooled, s.hidden, s.gate, stream_);
    check();
  }

  void gate_grad(const SqueezeExcite& se, int64_t n, const void* dgate, const Squeezed& s,
                 int64_t area, void* dpool, const Gradients& g, void* scratch) {
    cuda::se_gate_grad(sums_, layers(se, n), dgate, s.gate, s.hidden, s.pooled, area,
                       {scratch, dpool, g.w1, g.b1, g.w2, g.b2}, stream_);
    check();
  }

 private:
  // A plane of its own.
  struct Piece {
    Tensor memory;
    Map map;

    Piece(const CudaBackend& b, DType dtype, int64_t n, int64_t c, int64_t h, int64_t w)
        : memory(
              torch::stable::new_empty(b.like_, {n, c, h, w}, cuda::scalar_type(type_of(dtype)))),
          map{memory.mutable_data_ptr(), dtype, n, c, h, w, c * h * w, h * w, w, 1} {}
  };

  // Room for `count` sums of every plane in parts, where planes are large.
  struct Partial {
    std::optional<Tensor> memory;

    Partial(const CudaBackend& b, const Map& x, int64_t count) {
      const int64_t parts = cuda::plane_parts(map_of(x));
      if (parts > 1) {
        memory = torch::stable::new_empty(b.like_, {parts * count * x.n * x.c}, b.sums_type());
      }
    }
    void* data() const { return memory ? memory->mutable_data_ptr() : nullptr; }
  };

  torch::headeronly::ScalarType sums_type() const { return cuda::scalar_type(sums_); }
  void check() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

  // y (+)= factor x, through the sums' type where no kernel converts at once.
  void copy(const Map& y, const Map& x, double factor, bool add) {
    const cuda::Dtype from = type_of(x.dtype), to = type_of(y.dtype);
    if (cuda::converts(from, to)) {
      cuda::convert(from, map_of(x), to, map_of(y), factor, add, stream_);
    } else {
      const Piece wide(*this, DType::float32, x.n, x.c, x.h, x.w);
      cuda::convert(from, map_of(x), sums_, map_of(wide.map), factor, false, stream_);
      cuda::convert(sums_, map_of(wide.map), to, map_of(y), 1, add, stream_);
    }
    check();
  }

  // The weight in the planes' type, converted once per call of an op.
  const void* cast(const Matrix& w, cuda::Dtype dtype) {
    if (dtype == sums_) return w.data;
    for (const auto& [data, tensor] : casts_) {
      if (data == w.data) return tensor.const_data_ptr();
    }
    const int64_t count = w.rows * w.columns;
    Tensor tensor = torch::stable::new_empty(like_, {count}, cuda::scalar_type(dtype));
    const cuda::Map from{w.data, 1, 1, 1, count, 0, 0, 0, 1};
    const cuda::Map to{tensor.mutable_data_ptr(), 1, 1, 1, count, 0, 0, 0, 1};
    cuda::convert(sums_, from, dtype, to, 1, false, stream_);
    casts_.emplace_back(w.data, tensor);
    return tensor.const_data_ptr();
  }

  cuda::Filter filter(const Filter& f, const Map& x) const {
    return {f.data, type_of(x.dtype) != sums_, f.size, f.stride};
  }

  static cuda::Norm norm(const Affine& affine, const void* gate) {
    return {affine.scale, affine.shift, gate,
            affine.scale ? Activation::hardswish : Activation::identity};
  }

  static cuda::SqueezeExcite layers(const SqueezeExcite& se, int64_t n) {
    return {se.w1, se.b1, se.w2, se.b2, n, se.channels, se.hidden};
  }

  static cuda::Fold fold_of(const Statistics& s, const Norm& norm, int64_t count) {
    return {s.gamma, s.beta, s.mean,    s.var,      s.batches, s.momentum,
            s.eps,   count,  norm.rstd, norm.scale, norm.shift};
  }

  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Dtype sums_;
  cuda::Stream stream_ = nullptr;
  std::vector<std::pair<const void*, Tensor>> casts_;
};

STABLE_TORCH_LIBRARY_IMPL(revkernels, CUDA, m) {
  m.impl("mbconv", TORCH_BOX(&mbconv_op<CudaBackend>));
  m.impl("mbconv_recompute", TORCH_BOX(&mbconv_recompute_op<CudaBackend>));
  m.impl("mbconv_backward", TORCH_BOX(&mbconv_backward_op<CudaBackend>));
}

}  // namespace
}  // namespace revkernels
