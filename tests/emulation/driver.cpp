// C entry points to the emulated kernels, for ctypes: integers are int64_t, null is returned, or
// what went wrong.
#include "cuda_emulation.h"
#include "kernels.h"

namespace {

using namespace revkernels;
using namespace revkernels::cuda;

// Runs the launches, with the threads of a block in order or in reverse.
template <class F>
const char* emulate(int64_t reverse, const F& f) {
  static std::string error;
  emulation::device.error.clear();
  emulation::device.reverse = reverse != 0;
  f();
  error = emulation::device.error;
  return error.empty() ? nullptr : error.c_str();
}

// Kernels with one mistake each.
void divergent_barrier() {
  if (threadIdx.x < 7) __syncthreads();
}

void different_barriers() {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void missing_barrier(float* y) {
  REVK_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = 1;
  y[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

void unaligned_vector(float* y) { REVK_CHECK_ALIGNED(y + 1, 16); }

void shared_overflow() {
  REVK_SHARED(shared);
  shared[16 * blockDim.x] = 0;
}

void global_overflow(float* y) { y[blockDim.x] = 0; }

}  // namespace

extern "C" {

const char* emulate_upsample(int64_t reverse, int64_t dtype, const Map* x, void* y, int64_t factor,
                             int64_t mode) {
  return emulate(reverse,
                 [&] { upsample(Dtype(dtype), *x, y, factor, Upsampling(mode), nullptr); });
}

const char* emulate_upsample_adjoint(int64_t reverse, int64_t dtype, const Map* dy, void* dx,
                                     int64_t factor, int64_t mode) {
  return emulate(
      reverse, [&] { upsample_adjoint(Dtype(dtype), *dy, dx, factor, Upsampling(mode), nullptr); });
}

const char* emulate_space_to_depth(int64_t reverse, int64_t dtype, const Map* x, void* y,
                                   int64_t planes, int64_t block) {
  return emulate(reverse, [&] { space_to_depth(Dtype(dtype), *x, y, planes, block, nullptr); });
}

const char* emulate_depth_to_space(int64_t reverse, int64_t dtype, const Map* y, void* x,
                                   int64_t channels, int64_t block, int64_t sum_copies) {
  return emulate(reverse, [&] {
    depth_to_space(Dtype(dtype), *y, x, channels, block, sum_copies != 0, nullptr);
  });
}

const char* emulate_depthwise_conv(int64_t reverse, int64_t dtype, const Map* x, const void* weight,
                                   int64_t wide, int64_t k, int64_t stride, const void* scale,
                                   const void* shift, void* y) {
  return emulate(reverse, [&] {
    depthwise_conv(Dtype(dtype), *x, {weight, wide != 0, k, stride}, {scale, shift}, y, nullptr);
  });
}

const char* emulate_depthwise_conv_grad_input(int64_t reverse, int64_t dtype, const Map* dy,
                                              const void* weight, int64_t wide, int64_t k,
                                              int64_t stride, void* dx, int64_t stride_n,
                                              int64_t stride_c, int64_t height, int64_t width,
                                              int64_t add) {
  return emulate(reverse, [&] {
    depthwise_conv_grad_input(Dtype(dtype), *dy, {weight, wide != 0, k, stride},
                              {dx, stride_n, stride_c}, height, width, add != 0, nullptr);
  });
}

int64_t emulate_grad_weight_slices(int64_t dtype, const Map* dy, int64_t k, int64_t stride) {
  return grad_weight_slices(Dtype(dtype), *dy, k, stride);
}

const char* emulate_depthwise_conv_grad_weight(int64_t reverse, int64_t dtype, const Map* x,
                                               const Map* dy, const void* scale, const void* shift,
                                               int64_t k, int64_t stride, void* partial, void* dw) {
  return emulate(reverse, [&] {
    depthwise_conv_grad_weight(Dtype(dtype), *x, *dy, {scale, shift}, k, stride, partial, dw,
                               nullptr);
  });
}

const char* emulate_bn_act(int64_t reverse, int64_t dtype, const Map* x, const void* scale,
                           const void* shift, const void* gate, int64_t act, void* z,
                           int64_t stride_n, int64_t stride_c) {
  return emulate(reverse, [&] {
    bn_act(Dtype(dtype), *x, {scale, shift, gate, Activation(act)}, {z, stride_n, stride_c},
           nullptr);
  });
}

const char* emulate_bn_act_grad(int64_t reverse, int64_t dtype, int64_t dz_dtype, const Map* dz,
                                const Map* x, const void* scale, const void* shift,
                                const void* gate, const void* dpool, const void* slope,
                                const void* offset, int64_t act, void* dx, int64_t stride_n,
                                int64_t stride_c) {
  return emulate(reverse, [&] {
    bn_act_grad(Dtype(dtype), Dtype(dz_dtype), *dz, *x, {scale, shift, gate, Activation(act)},
                {dpool, slope, offset}, {dx, stride_n, stride_c}, nullptr);
  });
}

int64_t emulate_plane_parts(const Map* x) { return plane_parts(*x); }

const char* emulate_bn_act_squeeze(int64_t reverse, int64_t dtype, const Map* x, const void* scale,
                                   const void* shift, int64_t act, void* partial, void* pooled) {
  return emulate(reverse, [&] {
    bn_act_squeeze(Dtype(dtype), *x, {scale, shift, nullptr, Activation(act)}, partial, pooled,
                   nullptr);
  });
}

const char* emulate_bn_act_grad_sums(int64_t reverse, int64_t dtype, const Map* dz, const Map* x,
                                     const void* scale, const void* shift, const void* gate,
                                     const void* mean, int64_t act, void* partial, void* sums,
                                     int64_t stride, void* z, int64_t stride_n, int64_t stride_c) {
  const Output out{z, stride_n, stride_c};
  return emulate(reverse, [&] {
    bn_act_grad_sums(Dtype(dtype), *dz, *x, {scale, shift, gate, Activation(act)}, mean, partial,
                     sums, stride, z == nullptr ? nullptr : &out, nullptr);
  });
}

const char* emulate_coupling_sums(int64_t reverse, int64_t dtype, int64_t du_dtype, const Map* du,
                                  const Map* p, const void* mean, void* partial, void* sums,
                                  int64_t stride) {
  return emulate(reverse, [&] {
    coupling_sums(Dtype(dtype), Dtype(du_dtype), *du, *p, mean, partial, sums, stride, nullptr);
  });
}

// Statistics, and their fold in the same launch where there is a weight.
const char* emulate_bn_stats(int64_t reverse, int64_t dtype, const Map* x, double* moments,
                             void* mean, void* var, const void* weight, const void* bias,
                             void* running_mean, void* running_var, void* batches, double momentum,
                             double eps, void* rstd, void* scale, void* shift) {
  const Fold fold{weight,   bias, running_mean,       running_var, static_cast<int64_t*>(batches),
                  momentum, eps,  x->n * x->h * x->w, rstd,        scale,
                  shift};
  return emulate(reverse, [&] {
    bn_moments(Dtype(dtype), *x, moments, nullptr);
    bn_merge(Dtype(dtype), moments, x->n, x->c, x->h * x->w, mean, var,
             weight == nullptr ? nullptr : &fold, nullptr);
  });
}

const char* emulate_bn_statistics(int64_t reverse, int64_t dtype, const Map* x, double* moments,
                                  void* mean, void* var, const void* weight, const void* bias,
                                  void* running_mean, void* running_var, void* batches,
                                  double momentum, double eps, void* rstd, void* scale,
                                  void* shift) {
  const Fold fold{weight,   bias, running_mean,       running_var, static_cast<int64_t*>(batches),
                  momentum, eps,  x->n * x->h * x->w, rstd,        scale,
                  shift};
  return emulate(reverse, [&] {
    bn_statistics(Dtype(dtype), *x, moments, mean, var, weight == nullptr ? nullptr : &fold,
                  nullptr);
  });
}

const char* emulate_bn_fold(int64_t reverse, int64_t dtype, int64_t channels, const void* mean,
                            const void* var, const void* weight, const void* bias,
                            void* running_mean, void* running_var, void* batches, double momentum,
                            int64_t count, double eps, void* rstd, void* scale, void* shift) {
  const Fold fold{weight,   bias, running_mean, running_var, static_cast<int64_t*>(batches),
                  momentum, eps,  count,        rstd,        scale,
                  shift};
  return emulate(reverse, [&] { bn_fold(Dtype(dtype), channels, mean, var, fold, nullptr); });
}

const char* emulate_bn_fold_grad(int64_t reverse, int64_t dtype, const void* sums, int64_t five,
                                 const void* gate, int64_t gate_stride_n, int64_t gate_stride_c,
                                 const void* dpool, const void* mean, const void* rstd,
                                 const void* scale, int64_t samples, int64_t channels,
                                 int64_t count, int64_t batch, void* dweight, void* dbias,
                                 void* slope, void* offset) {
  const FoldGrad args{sums,          samples * channels,
                      five != 0,     gate,
                      gate_stride_n, gate_stride_c,
                      dpool,         mean,
                      rstd,          scale,
                      samples,       channels,
                      count,         batch != 0,
                      dweight,       dbias,
                      slope,         offset};
  return emulate(reverse, [&] { bn_fold_grad(Dtype(dtype), args, nullptr); });
}

// With `apart` in three launches.
const char* emulate_bn_grad(int64_t reverse, int64_t dtype, int64_t apart, int64_t dz_dtype,
                            const Map* dz, const Map* x, const void* scale, const void* shift,
                            int64_t act, const void* gate, int64_t gate_stride_n,
                            int64_t gate_stride_c, const void* dpool, const void* mean,
                            const void* rstd, int64_t batch, int64_t summed, void* sums,
                            void* dweight, void* dbias, void* slope, void* offset, void* dx,
                            int64_t stride_n, int64_t stride_c) {
  const int64_t n = x->n, c = x->c;
  const Norm norm{scale, shift, nullptr, Activation(act)};
  const FoldGrad args{sums,
                      n * c,
                      Activation(act) == Activation::hardswish,
                      gate,
                      gate_stride_n,
                      gate_stride_c,
                      dpool,
                      mean,
                      rstd,
                      scale,
                      n,
                      c,
                      n * x->h * x->w,
                      batch != 0,
                      dweight,
                      dbias,
                      slope,
                      offset};
  const Output out{dx, stride_n, stride_c};
  return emulate(reverse, [&] {
    if (apart == 0) {
      bn_grad(Dtype(dtype), Dtype(dz_dtype), *dz, *x, norm, args, summed ? nullptr : sums, nullptr,
              out, nullptr);
      return;
    }
    if (!summed && args.five) {
      bn_act_grad_sums(Dtype(dtype), *dz, *x, norm, mean, nullptr, sums, n * c, nullptr, nullptr);
    } else if (!summed) {
      coupling_sums(Dtype(dtype), Dtype(dz_dtype), *dz, *x, mean, nullptr, sums, n * c, nullptr);
    }
    bn_fold_grad(Dtype(dtype), args, nullptr);
    bn_act_grad(Dtype(dtype), Dtype(dz_dtype), *dz, *x,
                {scale, shift, gate, Activation(act), gate_stride_n, gate_stride_c},
                {dpool, slope, offset}, out, nullptr);
  });
}

const char* emulate_se_gate(int64_t reverse, int64_t dtype, const void* pooled, const void* w1,
                            const void* b1, const void* w2, const void* b2, int64_t n, int64_t c,
                            int64_t r, void* hidden, void* gate) {
  return emulate(reverse, [&] {
    se_gate(Dtype(dtype), {w1, b1, w2, b2, n, c, r}, pooled, hidden, gate, nullptr);
  });
}

// With `apart` in three launches.
const char* emulate_se_gate_act(int64_t reverse, int64_t dtype, int64_t apart, const Map* x,
                                const void* scale, const void* shift, const void* w1,
                                const void* b1, const void* w2, const void* b2, int64_t r,
                                void* partial, void* pooled, void* hidden, void* gate, void* z,
                                int64_t stride_n, int64_t stride_c) {
  Norm norm{scale, shift, nullptr, Activation::hardswish};
  const SqueezeExcite se{w1, b1, w2, b2, x->n, x->c, r};
  const Output out{z, stride_n, stride_c};
  return emulate(reverse, [&] {
    if (apart == 0) {
      se_gate_act(Dtype(dtype), *x, norm, se, partial, pooled, hidden, gate, out, nullptr);
      return;
    }
    bn_act_squeeze(Dtype(dtype), *x, norm, partial, pooled, nullptr);
    se_gate(Dtype(dtype), se, pooled, hidden, gate, nullptr);
    norm.gate = gate;
    bn_act(Dtype(dtype), *x, norm, out, nullptr);
  });
}

const char* emulate_se_gate_grad(int64_t reverse, int64_t dtype, const void* dgate,
                                 const void* gate, const void* hidden, const void* pooled,
                                 const void* w1, const void* w2, int64_t n, int64_t c, int64_t r,
                                 int64_t pixels, void* dhidden, void* dpooled, void* dw1, void* db1,
                                 void* dw2, void* db2) {
  return emulate(reverse, [&] {
    se_gate_grad(Dtype(dtype), {w1, nullptr, w2, nullptr, n, c, r}, dgate, gate, hidden, pooled,
                 pixels, {dhidden, dpooled, dw1, db1, dw2, db2}, nullptr);
  });
}

const char* emulate_convert(int64_t reverse, int64_t from, const Map* x, int64_t to, const Map* y,
                            double factor, int64_t add) {
  return emulate(reverse,
                 [&] { convert(Dtype(from), *x, Dtype(to), *y, factor, add != 0, nullptr); });
}

const char* emulate_fold_parts(int64_t reverse, int64_t dtype, const void* partial, int64_t parts,
                               int64_t rows, int64_t size, void* out, int64_t stride, int64_t add) {
  return emulate(reverse, [&] {
    fold_parts(Dtype(dtype), partial, parts, rows, size, out, stride, add != 0, nullptr);
  });
}

const char* emulate_zero_tails(int64_t reverse, int64_t dtype, void* rows, int64_t count,
                               int64_t pitch, int64_t begin) {
  return emulate(reverse, [&] { zero_tails(Dtype(dtype), rows, count, pitch, begin, nullptr); });
}

// Runs the named broken kernel on 32 threads; y holds 32 floats.
const char* emulate_mistake(int64_t reverse, const char* name, float* y) {
  const std::string mistake = name;
  return emulate(reverse, [&] {
    if (mistake == "divergent_barrier") REVK_LAUNCH(divergent_barrier, 1, 32, 0, nullptr, );
    if (mistake == "different_barriers") REVK_LAUNCH(different_barriers, 1, 32, 0, nullptr, );
    if (mistake == "missing_barrier") REVK_LAUNCH(missing_barrier, 1, 32, 128, nullptr, y);
    if (mistake == "unaligned_vector") REVK_LAUNCH(unaligned_vector, 1, 32, 0, nullptr, y);
    if (mistake == "shared_overflow") REVK_LAUNCH(shared_overflow, 1, 32, 512, nullptr, );
    if (mistake == "global_overflow") REVK_LAUNCH(global_overflow, 1, 32, 0, nullptr, y);
    if (mistake == "too_much_shared_memory")
      REVK_LAUNCH(divergent_barrier, 1, 32, 49153, nullptr, );
  });
}

}  // extern "C"
