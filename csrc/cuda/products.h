// The 1x1 convolution's matrix products: cuBLAS through PyTorch's own ops, and their workspace.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "tensors.h"

namespace revkernels::cuda {

ScalarType scalar_type(Dtype dtype);

// [batch, rows, columns] of any strides, by which the products know an operand.
struct Matrices {
  const void* data;
  int64_t batch, rows, columns;
  int64_t stride_b, stride_r, stride_c;
};

// The planes of a map without gaps between their pixels, as [N, C, H W].
Matrices matrices_of(const Map& m);

// out (+)= a b. `sums`: a and b have 16 bits, out the type that their sums are kept in.
void multiply(Dtype dtype, int device, const Matrices& out, const Matrices& a, const Matrices& b,
              bool add, bool sums = false);

// A prologue z = gate h(scale x + shift); null scale for z = x.
//
// y (+)= W z: W [O, C] of the maps' dtype with any strides.
void pointwise(const Tensor& like, Dtype dtype, const Map& y, const Map& x, const Matrices& weight,
               const Norm& norm, bool add, Stream stream);

// dw [O, C] (+)= sum_{n, hw} dy z^T in the type of sums, folded in a fixed order.
//
// Small products: one per sample, then their sum. Otherwise one product over samples and pixels in
// a few parts, for which z and dy are laid out channel by channel first.
// Workspace: z, and at most max(kPartialBytes, one sample's product) of products, and at most
// kPackedBytes (or one sample's maps) of maps laid out anew.
constexpr int64_t kPartialBytes = int64_t(16) << 20;
constexpr int64_t kPackedBytes = int64_t(128) << 20;
void pointwise_grad_weight(const Tensor& like, Dtype dtype, void* dw, const Map& x, const Map& dy,
                           const Norm& norm, bool add, Stream stream);

}  // namespace revkernels::cuda
