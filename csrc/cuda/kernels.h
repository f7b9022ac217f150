// Launchers of the CUDA kernels. They take raw pointers and know nothing of torch, so that the same
// sources also compile as plain C++ and the tests can execute them without a GPU.
#pragma once

#include <cstdint>

#include "common.h"

namespace revkernels::cuda {

// int16: what streams are stored in, and only convert() reads.
enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3, int16 = 4 };

using Stream = void*;  // a cudaStream_t

// An input [N, C, H, W] with any strides, in elements. Outputs that come as bare pointers are
// contiguous.
struct Map {
  const void* data;
  int64_t n, c, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// Whether the pixels of every plane lie one after another.
inline bool is_dense(const Map& m) {
  return (m.w == 1 || m.stride_w == 1) && (m.h == 1 || m.stride_h == m.w);
}

// Depthwise weights [C, 1, k, k], contiguous, in the maps' dtype or in the type that sums are kept
// in.
struct Filter {
  const void* weight;
  bool wide;  // whether it is the latter
  int64_t size, stride;
};

// The prologue z = hardswish(scale x + shift), [C] each, in the type that sums are kept in; null
// for z = x.
struct Affine {
  const void *scale, *shift;
};

// A map that is written: its planes without gaps, its samples and channels anywhere.
struct Output {
  void* data;
  int64_t stride_n, stride_c;
};

// gate h(scale x + shift): scale and shift [C], gate [N, C], contiguous and in the type that sums
// are kept in; null for 1, 0 and 1.
struct Norm {
  const void *scale, *shift, *gate;
  Activation act;
  int64_t gate_stride_n = 0, gate_stride_c = 1;  // 0 for C
};

// What its gradient takes beside: dpool [N, C], slope and offset [C], likewise; null for 0.
struct NormGrad {
  const void *dpool, *slope, *offset;
};

void upsample(Dtype dtype, const Map& x, void* y, int64_t factor, Upsampling mode, Stream stream);
void upsample_adjoint(Dtype dtype, const Map& dy, void* dx, int64_t factor, Upsampling mode,
                      Stream stream);

void space_to_depth(Dtype dtype, const Map& x, void* y, int64_t planes, int64_t block,
                    Stream stream);
// The first copy of each plane, or with `sum_copies` the transpose of space_to_depth.
void depth_to_space(Dtype dtype, const Map& y, void* x, int64_t channels, int64_t block,
                    bool sum_copies, Stream stream);

void depthwise_conv(Dtype dtype, const Map& x, const Filter& filter, const Affine& prologue,
                    void* y, Stream stream);
// dx of height x width pixels, or with `add` added to it.
void depthwise_conv_grad_input(Dtype dtype, const Map& dy, const Filter& filter, const Output& dx,
                               int64_t height, int64_t width, bool add, Stream stream);

// Into how many parts the samples are split: `partial` holds [slices, C, k, k] sums.
int64_t grad_weight_slices(Dtype dtype, const Map& dy, int64_t kernel, int64_t stride);
void depthwise_conv_grad_weight(Dtype dtype, const Map& x, const Map& dy, const Affine& prologue,
                                int64_t kernel, int64_t stride, void* partial, void* dw,
                                Stream stream);

void bn_act(Dtype dtype, const Map& x, const Norm& norm, const Output& z, Stream stream);
// dz has x's dtype, or is float32 beside 16 bits.
void bn_act_grad(Dtype dtype, Dtype dz_dtype, const Map& dz, const Map& x, const Norm& norm,
                 const NormGrad& grad, const Output& dx, Stream stream);

// Into how many parts a plane is split: `partial` holds [parts, N, C] or [parts, 5, N, C] sums.
int64_t plane_parts(const Map& x);
void bn_act_squeeze(Dtype dtype, const Map& x, const Norm& norm, void* partial, void* pooled,
                    Stream stream);
// Five sums [N, C], `stride` apart, and z itself where it is given: bn_act in the same pass.
void bn_act_grad_sums(Dtype dtype, const Map& dz, const Map& x, const Norm& norm, const void* mean,
                      void* partial, void* sums, int64_t stride, const Output* z, Stream stream);
// Two sums [N, C], `stride` apart: sum_hw du, sum_hw du (p - mean). du may be float32 beside 16-bit
// p, as in bn_act_grad dz beside x.
void coupling_sums(Dtype dtype, Dtype du_dtype, const Map& du, const Map& p, const void* mean,
                   void* partial, void* sums, int64_t stride, Stream stream);

// out[r, i] = sum_s partial[s, r, i] over `parts` of `rows` x `size` sums each, in order; with
// `add` onto out, whose rows are `stride` apart.
void fold_parts(Dtype dtype, const void* partial, int64_t parts, int64_t rows, int64_t size,
                void* out, int64_t stride, bool add, Stream stream);
// rows[r, begin .. pitch) = 0 of `count` rows.
void zero_tails(Dtype dtype, void* rows, int64_t count, int64_t pitch, int64_t begin,
                Stream stream);

// BatchNorm's parameters, running statistics and what is made of them: [C] each, contiguous, in the
// type that sums are kept in.
struct Fold {
  const void *weight, *bias;
  void *running_mean, *running_var;  // null where they are not tracked
  int64_t* batches;                  // likewise
  double momentum, eps;
  int64_t count;
  void *rstd, *scale, *shift;
  void* mean = nullptr;  // a copy of the mean, null where it is not wanted
};

// moments [N, C, 2]: mean and sum of squared deviations of every plane.
void bn_moments(Dtype dtype, const Map& x, double* moments, Stream stream);
// Mean and biased variance (or null) of every channel from its planes' moments over `area` pixels
// each, and in the same launch their fold, where one is given. In the type of the sums.
void bn_merge(Dtype dtype, const double* moments, int64_t samples, int64_t channels, int64_t area,
              void* mean, void* var, const Fold* fold, Stream stream);
// Both, in one launch where a block can take all planes of a channel; the same bits.
void bn_statistics(Dtype dtype, const Map& x, double* moments, void* mean, void* var,
                   const Fold* fold, Stream stream);
void bn_fold(Dtype dtype, int64_t channels, const void* mean, const void* var, const Fold& fold,
             Stream stream);

// Sums [N, C] over g and over g (x - mean), `sum_stride` apart; or five, of which those are the
// second and the third, and the last two are over h' and h' (x - mean).
struct FoldGrad {
  const void* sums;
  int64_t sum_stride;
  bool five;
  const void* gate;  // [N, C] with any strides, null for 1
  int64_t gate_stride_n, gate_stride_c;
  const void* dpool;  // [N, C], null for 0
  const void *mean, *rstd, *scale;
  int64_t samples, channels, count;
  bool batch;
  void *dweight, *dbias, *slope, *offset;  // the last two null where they are not wanted
};
void bn_fold_grad(Dtype dtype, const FoldGrad& args, Stream stream);
// bn_fold_grad and, with its gate, bn_act_grad; where args.sums are not there yet, `sums` are the
// same for bn_act_grad_sums, or coupling_sums where there are two, to write. In one launch where a
// block can take all planes of a channel; the same bits.
void bn_grad(Dtype dtype, Dtype dz_dtype, const Map& dz, const Map& x, const Norm& norm,
             const FoldGrad& args, void* sums, void* partial, const Output& dx, Stream stream);

// hidden = w1 pooled + b1, gate = hardsigmoid(w2 hardswish(hidden) + b2): pooled [N, C], w1 [R, C],
// w2 [C, R], contiguous, float32 or float64.
struct SqueezeExcite {
  const void *w1, *b1, *w2, *b2;
  int64_t samples, channels, hidden;
};
void se_gate(Dtype dtype, const SqueezeExcite& se, const void* pooled, void* hidden, void* gate,
             Stream stream);

// bn_act_squeeze, se_gate and with that gate bn_act into z; in one launch where a block can take a
// sample; the same bits.
void se_gate_act(Dtype dtype, const Map& x, const Norm& norm, const SqueezeExcite& se,
                 void* partial, void* pooled, void* hidden, void* gate, const Output& z,
                 Stream stream);

struct SqueezeExciteGrad {
  void *dhidden, *dpooled, *dw1, *db1, *dw2, *db2;  // dhidden [N, R] is workspace
};
// dpooled comes divided by `pixels`.
void se_gate_grad(Dtype dtype, const SqueezeExcite& se, const void* dgate, const void* gate,
                  const void* hidden, const void* pooled, int64_t pixels,
                  const SqueezeExciteGrad& grad, Stream stream);

// y <- factor x, or with `add` y <- y + factor x, y of any strides; see converts().
void convert(Dtype from, const Map& x, Dtype to, const Map& y, double factor, bool add,
             Stream stream);
// Whether there is such a kernel: between equal types, from int16, between float32 and 16 bits.
bool converts(Dtype from, Dtype to);

}  // namespace revkernels::cuda
