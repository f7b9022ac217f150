// What the operators (baseline code, torch's types) hand to the kernels (one copy per instruction
// set, plain pointers): argument structs and the table of kernels chosen once at run time.
#pragma once

#include <cstdint>

#include "../map.h"

namespace revkernels {

// y <- y + sign sum_k up_{f_k}(a_k p_k + b_k); with `assign`, y <- sum_k (...).
// With `steps` = 2^g, the sum t becomes q / steps, q = rint(t steps); an int16 y holds y steps.
struct Contribution {
  Map p;
  Coefficient scale, shift;
  int64_t factor = 1;
};

struct CoupleArgs {
  Map y;
  const Contribution* terms = nullptr;
  int64_t count = 0;
  Upsampling mode = Upsampling::bilinear;
  double sign = 1;
  double steps = 0;             // grid steps per unit; 0 for no grid
  int64_t* overflow = nullptr;  // grows by the results that left the range; null: not counted
  bool assign = false;
  bool wide = false;  // accumulate in float64
};

// x <- step y, y int16.
struct DequantizeArgs {
  Map x, y;
  double step = 1;  // a power of 2
};

// du = up_f^T(dy), and sums [2, N, C] of du and du (p - center). Absent outputs have null data.
struct Gather {
  Map du;
  Map p;
  Coefficient center;
  void* sums = nullptr;
  int64_t sums_stride = 0;  // elements from one sum to the other
  int64_t factor = 1;
};

struct CoupleAdjointArgs {
  Map dy;
  const Gather* terms = nullptr;
  int64_t count = 0;
  Upsampling mode = Upsampling::bilinear;
  bool wide = false;
};

// y <- beta y + (p + c x), or its inverse; the adjoint takes dx as x, dy as y and g as p. All maps
// are one row of `size` elements. With integer_bytes, y and x hold integers, beta is 2^-bits, and
// `steps` are grid steps per unit of p.
struct DualResidualArgs {
  Map y, x, p;  // x, p: absent ones have null data
  int64_t size = 0, integer_bytes = 0, bits = 0;
  double coefficient = 0, beta = 1, steps = 1;
  uint8_t* remainder = nullptr;  // the packed bits that go; null: they are not kept
  int64_t* overflow = nullptr;   // grows by the results that left the range; null: not counted
  bool inverse = false, wide = false;
};

// Pixels to channels and back; `image` is the [N, C, H, W] side, `blocks` the [N, planes b^2, H/b,
// W/b] side.
struct ShuffleArgs {
  Map image, blocks;
  int64_t planes = 0, block = 1;
  bool sum_copies = false;  // depth to space: sum the repeated planes instead of taking the first
};

// `weight` is [C, k, k] in the accumulate dtype. `out` is contiguous.
struct DepthwiseArgs {
  Map in;   // x, or dy for the input gradient
  Map out;  // y, or dv
  Map dy;   // weight gradient only
  const void* weight = nullptr;
  void* partial = nullptr;   // weight gradient only: [groups, C, k, k]
  Coefficient scale, shift;  // hardswish prologue of x, or absent
  int64_t kernel = 1, stride = 1;
  bool wide = false;
};

struct NormArgs {
  Map x, dz, out;
  Coefficient scale, shift, gate, mean, dpool, slope, offset;
  void* sums = nullptr;       // squeeze [N, C]; gradient sums [5, N, C]
  int64_t sums_stride = 0;    // elements from one gradient sum to the next
  double* moments = nullptr;  // [N, C, 2]: mean and sum of squared deviations of each plane
  Activation act = Activation::identity;
  bool wide = false;
};

constexpr int64_t kPanelColumns = 48;   // whole tiles of a 1x1 convolution
constexpr int64_t kPanelChannels = 96;  // most channels of a panel of its weight's gradient
constexpr int64_t kBlockRows = 32;      // rows of that in a unit: whole tiles

// y = weight z, or out_scale weight z + out_shift; z = gate hardswish(scale x + shift), or x if
// scale is absent. For the gradient of the weight y is dy.
struct PointwiseArgs {
  Map x, y;
  const void* weight = nullptr;  // [y.c, x.c] in the accumulate dtype
  int64_t weight_row = 0, weight_column = 0;
  int64_t panel = kPanelColumns;  // pixels of a unit, a multiple; channels of one of the gradient
  int64_t blocks = 1;  // of the weight's rows; for its gradient 0: kDotRows rows of z are a unit
  bool add = false;    // y grows by that; for the gradient in panels: grad_weight by sum dy z^T
  void* grad_weight = nullptr;  // [y.c, x.c], contiguous; without panels it grows always
  Coefficient scale, shift, gate, out_scale, out_shift;
  bool wide = false;
};

// out = f(in weight^T + bias) of row-major matrices in the accumulate dtype; f is the identity or
// hardsigmoid.
struct LayerArgs {
  const void* in = nullptr;      // [n, width]
  const void* weight = nullptr;  // [rows, width]
  const void* bias = nullptr;    // [rows]
  void* out = nullptr;           // [n, rows]
  void* active = nullptr;        // [n, rows]: hardswish(out), if not null
  int64_t n = 0, width = 0, rows = 0;
  bool hardsigmoid = false;
  bool wide = false;
};

// out = left right, times hardswish'(hidden) if that is not null; `left` has any strides.
struct ProductArgs {
  const void* left = nullptr;    // [rows, depth]
  const void* right = nullptr;   // [depth, columns]
  const void* hidden = nullptr;  // [rows, columns]
  void* out = nullptr;           // [rows, columns]
  int64_t rows = 0, depth = 0, columns = 0;
  int64_t left_row = 0, left_column = 0;
  bool wide = false;
};

// dv = dgate hardsigmoid', known from the gate; active = hardswish(hidden).
struct GateSlopeArgs {
  const void *dgate = nullptr, *gate = nullptr, *hidden = nullptr;
  void *dv = nullptr, *active = nullptr;
  int64_t gates = 0, hiddens = 0;  // elements
  bool wide = false;
};

constexpr int64_t kDequantizeBlock = 4096;    // elements of a row in a unit
constexpr int64_t kDualResidualBlock = 4096;  // elements of a unit, a multiple of 8
constexpr int kDotRows = 4;                   // rows of a layer's weight, or of z, in a unit
constexpr int64_t kColumnBlock = 64;          // columns of a product in a unit: whole vectors
constexpr int64_t kDepthBlock = 128;          // terms of a product summed in registers
constexpr int64_t kGateSegment = 1024;        // elements of gate_slopes in a unit
constexpr int64_t kProductsPerElement = 16;   // products that cost what one element of a map does

// Each kernel works on the half-open range [begin, end) of its units, independently of the others.
struct Kernels {
  const char* name;
  void (*couple)(const CoupleArgs&, int64_t begin, int64_t end);                 // planes n C + c
  void (*couple_adjoint)(const CoupleAdjointArgs&, int64_t begin, int64_t end);  // planes n C + c
  void (*dequantize)(const DequantizeArgs&, int64_t begin, int64_t end);         // blocks of rows
  void (*dual_residual)(const DualResidualArgs&, int64_t begin, int64_t end);    // blocks
  void (*dual_residual_adjoint)(const DualResidualArgs&, int64_t begin, int64_t end);  // blocks
  void (*space_to_depth)(const ShuffleArgs&, int64_t begin, int64_t end);  // (n C + c) b + r
  void (*depth_to_space)(const ShuffleArgs&, int64_t begin, int64_t end);  // planes n C + c
  void (*depthwise)(const DepthwiseArgs&, int64_t begin, int64_t end);     // planes n C + c
  void (*depthwise_grad_input)(const DepthwiseArgs&, int64_t begin, int64_t end);   // planes
  void (*depthwise_grad_weight)(const DepthwiseArgs&, int64_t begin, int64_t end);  // group C + c
  void (*pointwise)(const PointwiseArgs&, int64_t begin, int64_t end);  // panel blocks + block
  void (*pointwise_grad_weight)(const PointwiseArgs&, int64_t begin, int64_t end);  // see blocks
  void (*bn_moments)(const NormArgs&, int64_t begin, int64_t end);  // planes n C + c
  void (*bn_act)(const NormArgs&, int64_t begin, int64_t end);
  void (*bn_act_squeeze)(const NormArgs&, int64_t begin, int64_t end);
  void (*bn_act_grad_sums)(const NormArgs&, int64_t begin, int64_t end);
  void (*bn_act_grad)(const NormArgs&, int64_t begin, int64_t end);
  void (*layer)(const LayerArgs&, int64_t begin, int64_t end);            // kDotRows rows of weight
  void (*product)(const ProductArgs&, int64_t begin, int64_t end);        // kColumnBlock columns
  void (*gate_slopes)(const GateSlopeArgs&, int64_t begin, int64_t end);  // kGateSegment elements
};

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define REVK_X86_MULTIVERSION 1
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

// The widest instruction set that was compiled in and that this processor runs, or the one that the
// environment variable REVKERNELS_CPU_ISA names.
const Kernels& kernels();

// Memory aligned for every vector type, to be freed by the same thread in reverse order; throws
// std::bad_alloc.
void* allocate_scratch(int64_t bytes);
void free_scratch(void* scratch);

}  // namespace revkernels
