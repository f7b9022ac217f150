// Launchers of the CUDA kernels. They take raw pointers and know nothing of torch, so that the same
// sources also compile as plain C++ and the tests can execute them without a GPU.
#pragma once

#include <cstdint>

#include "common.h"

namespace revkernels::cuda {

enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

using Stream = void*;  // a cudaStream_t

// An input [N, C, H, W] with any strides, in elements. Outputs are contiguous and come as bare
// pointers.
struct Map {
  const void* data;
  int64_t n, c, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

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
void depthwise_conv_grad_input(Dtype dtype, const Map& dy, const Filter& filter, void* dx,
                               int64_t height, int64_t width, Stream stream);

// Into how many parts the samples are split: `partial` holds [slices, C, k, k] sums.
int64_t grad_weight_slices(Dtype dtype, const Map& dy, int64_t kernel, int64_t stride);
void depthwise_conv_grad_weight(Dtype dtype, const Map& x, const Map& dy, const Affine& prologue,
                                int64_t kernel, int64_t stride, void* partial, void* dw,
                                Stream stream);

}  // namespace revkernels::cuda
