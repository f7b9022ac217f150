// Index arithmetic and per-output formulas, shared by the CPU and the CUDA kernels.
//
// N samples, C channels, H x W maps; f an upsampling factor, b a space-to-depth block, k a
// depthwise kernel size (odd), P = (k - 1) / 2 its padding, s its stride. Nothing here allocates or
// includes torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define REVK_HD static __host__ __device__ __forceinline__
#else
// Internal linkage: each instruction set's translation unit keeps its own copy.
#define REVK_HD static inline
#endif

namespace revkernels {

enum class Upsampling : int { bilinear = 0, nearest = 1 };
enum class Activation : int { identity = 0, hardswish = 1 };

REVK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- resampling -------------------------------------------------------------------------------

// One output coordinate of an upsampling: out = w0 x[i0] + w1 x[i1], both indices within the map.
template <class A>
struct Lerp {
  int64_t i0, i1;
  A w0, w1;
};

// Bilinear, align_corners=False: output i lies at (i + 1/2) / f - 1/2, clamped to the map of
// `size`. At the edges i0 == i1, w0 == 1 and w1 == 0. Exact for f in {1, 2, 4, 8}.
template <class A>
REVK_HD Lerp<A> bilinear_source(int64_t i, int64_t f, int64_t size) {
  const int64_t q = i / f, r = i % f;
  const int64_t twice = 2 * r + 1 - f;  // 2 f (position - q)
  const int64_t low = twice < 0 ? q - 1 : q;
  if (low < 0) return {0, 0, A(1), A(0)};
  if (low + 1 >= size) return {size - 1, size - 1, A(1), A(0)};
  const A t = A(twice < 0 ? twice + 2 * f : twice) / A(2 * f);
  return {low, low + 1, A(1) - t, t};
}

template <class A>
REVK_HD Lerp<A> nearest_source(int64_t i, int64_t f) {
  return {i / f, i / f, A(1), A(0)};
}

template <class A>
REVK_HD Lerp<A> upsample_source(int64_t i, int64_t f, int64_t size, Upsampling mode) {
  return mode == Upsampling::nearest ? nearest_source<A>(i, f) : bilinear_source<A>(i, f, size);
}

// Half-open range of outputs that read input j: the gather window of the adjoint.
struct Window {
  int64_t begin, end;
};

REVK_HD Window adjoint_window(int64_t j, int64_t f, int64_t size, Upsampling mode) {
  const int64_t reach = mode == Upsampling::nearest ? 0 : f / 2;
  const int64_t begin = f * j - reach, end = f * j + f + reach;
  return {begin < 0 ? 0 : begin, end > f * size ? f * size : end};
}

// The weight with which output i reads input j.
template <class A>
REVK_HD A adjoint_weight(int64_t i, int64_t j, int64_t f, int64_t size, Upsampling mode) {
  const Lerp<A> source = upsample_source<A>(i, f, size, mode);
  return (source.i0 == j ? source.w0 : A(0)) + (source.i1 == j ? source.w1 : A(0));
}

// Space-to-depth: output channel (r b + q) planes + p reads image plane p mod C at pixel (i b + r,
// j b + q).
struct Pixel {
  int64_t channel, row, column;
};

REVK_HD Pixel space_to_depth_source(int64_t out_channel, int64_t planes, int64_t channels,
                                    int64_t b) {
  const int64_t phase = out_channel / planes;
  return {(out_channel % planes) % channels, phase / b, phase % b};
}

REVK_HD int64_t depth_to_space_source(int64_t plane, int64_t row, int64_t column, int64_t planes,
                                      int64_t b) {
  return ((row % b) * b + column % b) * planes + plane;
}

// --- depthwise convolution --------------------------------------------------------------------

// Outputs that read input coordinate h: taps u = tap + s t, t = 0 .. count - 1, of outputs output -
// t. An output may lie outside [0, ceil(size / s)) and then does not exist.
struct PhaseTaps {
  int64_t tap, output, count;
};

REVK_HD PhaseTaps depthwise_phase(int64_t h, int64_t k, int64_t s) {
  const int64_t padded = h + (k - 1) / 2;
  const int64_t tap = padded % s;
  return {tap, padded / s, tap < k ? ceil_div(k - tap, s) : 0};
}

// Samples summed into one partial weight gradient: fixed, so that results do not depend on threads.
constexpr int64_t kSamplesPerPartial = 8;

REVK_HD int64_t depthwise_out_size(int64_t size, int64_t s) { return ceil_div(size, s); }

// --- activation -------------------------------------------------------------------------------

template <class A>
REVK_HD A hardswish(A u) {
  const A t = u + A(3);
  const A clamped = t < A(0) ? A(0) : (t > A(6) ? A(6) : t);
  return u * clamped * (A(1) / A(6));
}

// 0 for u <= -3, 1 for u >= 3, (2 u + 3) / 6 between.
template <class A>
REVK_HD A hardswish_slope(A u) {
  const A inner = (A(2) * u + A(3)) * (A(1) / A(6));
  return u <= A(-3) ? A(0) : (u >= A(3) ? A(1) : inner);
}

// a x + b in one rounding: the same bits however a compiler contracts what surrounds it.
REVK_HD float multiply_add(float a, float x, float b) { return fmaf(a, x, b); }
REVK_HD double multiply_add(double a, double x, double b) { return fma(a, x, b); }

// min(max(u + 3, 0), 6) / 6
template <class A>
REVK_HD A hardsigmoid(A u) {
  const A t = u + A(3);
  return (t < A(0) ? A(0) : (t > A(6) ? A(6) : t)) / A(6);
}

// The slope of hardsigmoid from its value: 1/6, as float32 has it, inside (0, 1), as in PyTorch.
template <class A>
REVK_HD A hardsigmoid_slope(A gate) {
  return gate > A(0) && gate < A(1) ? A(1.f / 6.f) : A(0);
}

template <class A>
REVK_HD A activate(A u, Activation act) {
  return act == Activation::hardswish ? hardswish(u) : u;
}

template <class A>
REVK_HD A activation_slope(A u, Activation act) {
  return act == Activation::hardswish ? hardswish_slope(u) : A(1);
}

// --- batch normalisation ----------------------------------------------------------------------

// The number of some values, their mean, and the sum of their squared distances from it.
template <class A>
struct Moments {
  A count, mean, m2;
};

// Of two sets together (Chan); either may be empty.
template <class A>
REVK_HD Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  const A count = a.count + b.count;
  if (count == A(0)) return a;
  const A delta = b.mean - a.mean, share = b.count / count;
  return {count, multiply_add(delta, share, a.mean),
          a.m2 + multiply_add(delta * delta, a.count * share, b.m2)};
}

// What batch normalisation does to a channel, scale x + shift, and the rstd it is made of.
template <class A>
struct Normalisation {
  A rstd, scale, shift;
};

template <class A>
REVK_HD Normalisation<A> normalisation(A mean, A var, A weight, A bias, A eps) {
  const A rstd = A(1) / sqrt(var + eps), scale = weight * rstd;
  return {rstd, scale, multiply_add(-mean, scale, bias)};
}

// A running statistic moves towards v.
template <class A>
REVK_HD A moved(A running, A v, A momentum) {
  return multiply_add(momentum, v - running, running);
}

// Gradients of a channel's weight and bias, and what is left of its input's after scale g.
template <class A>
struct NormalisationGrad {
  A dweight, dbias, slope, offset;
};

// From the sums of g and of g (x - mean) over `count` values, whose statistics they are if `batch`.
template <class A>
REVK_HD NormalisationGrad<A> normalisation_grad(A sum, A centred, A mean, A rstd, A scale, A count,
                                                bool batch) {
  const A dweight = rstd * centred;
  if (!batch) return {dweight, sum, A(0), A(0)};
  const A share = scale / -count, slope = share * rstd * dweight;
  return {dweight, sum, slope, multiply_add(-slope, mean, share * sum)};
}

// --- 16-bit floats ----------------------------------------------------------------------------

// Storage only: arithmetic is in float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

REVK_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

REVK_HD uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

REVK_HD float to_float(bfloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

REVK_HD float to_float(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shifted as if it were a float; 2^112 corrects the exponent, subnormals included.
  const float scaled = float_from_bits(magnitude << 13) * float_from_bits(0x77800000u);
  return float_from_bits(sign | bits_of_float(scaled));
}

// Round to nearest, ties to even; NaN stays NaN.
REVK_HD bfloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

REVK_HD float16 to_float16(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u)
    return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 2^-1 leaves the subnormal's bits, correctly rounded, in the low mantissa.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return {uint16_t(sign | (bits_of_float(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
}

REVK_HD float to_float(float value) { return value; }
REVK_HD double to_float(double value) { return value; }

// The type that sums are kept in.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

// The accumulated value, rounded to T once.
template <class T>
REVK_HD T from_float(accumulate_t<T> v) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(v);
  } else if constexpr (std::is_same_v<T, float16>) {
    return to_float16(v);
  } else {
    return v;
  }
}

}  // namespace revkernels
