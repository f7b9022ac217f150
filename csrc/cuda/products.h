// The 1x1 convolution and its weight gradient: kernels around the matrix products of a Device.
//
// A Device has
//   stream                                       of its launches
//   Memory allocate(int64_t bytes)               freed with the Memory, whose data() it is
//   void multiply(Dtype dtype, Dtype out_dtype, const Matrices& out, const Matrices& a,
//                 const Matrices& b, bool add)   out (+)= a b
#pragma once

#include <algorithm>

#include "kernels.h"

namespace revkernels::cuda {

// [batch, rows, columns] of any strides, by which products know an operand.
struct Matrices {
  const void* data;
  int64_t batch, rows, columns;
  int64_t stride_b, stride_r, stride_c;

  Matrices transpose() const { return {data, batch, columns, rows, stride_b, stride_c, stride_r}; }
};

// The planes of a map without gaps between their pixels, as [N, C, H W].
inline Matrices matrices_of(const Map& m) {
  return {m.data, m.n, m.c, m.h * m.w, m.stride_n, m.stride_c, 1};
}

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : (dtype == Dtype::float32 ? 4 : 2);
}

inline Dtype sums_of(Dtype dtype) {
  return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

// The norm of samples from `begin` on, of maps with c channels.
inline Norm rows(Norm norm, Dtype dtype, int64_t begin, int64_t c) {
  if (norm.gate != nullptr) {
    norm.gate = static_cast<const char*>(norm.gate) + begin * c * bytes_of(sums_of(dtype));
  }
  return norm;
}

// z in memory of its own, or x itself if that is `plain` and its planes have no gaps. write(m,
// begin, z) fills z from m, x's samples from `begin` on.
template <class Device>
class Activated {
 public:
  template <class Write>
  Activated(Device& device, Dtype dtype, const Map& x, bool plain, const Write& write)
      : z_(matrices_of(x)) {
    if (plain && is_dense(x)) return;
    const int64_t pixels = x.h * x.w, sample = x.c * pixels;
    memory_ = device.allocate(x.n * sample * bytes_of(dtype));
    write(x, 0, Output{memory_.data(), sample, pixels});
    z_ = {memory_.data(), x.n, x.c, pixels, sample, pixels, 1};
  }
  const Matrices& matrices() const { return z_; }

 private:
  typename Device::Memory memory_;
  Matrices z_;
};

// y (+)= W z: W [O, C] in the maps' dtype, y without gaps between its pixels; z as Activated's.
template <class Device, class Write>
void pointwise(Device& device, Dtype dtype, const Map& y, const Map& x, const Matrices& weight,
               bool plain, const Write& write, bool add) {
  const Activated<Device> z(device, dtype, x, plain, write);
  Matrices w = weight;
  w.batch = x.n, w.stride_b = 0;
  device.multiply(dtype, dtype, matrices_of(y), w, z.matrices(), add);
}

// Likewise, z = gate h(scale x + shift).
template <class Device>
void pointwise(Device& device, Dtype dtype, const Map& y, const Map& x, const Matrices& weight,
               const Norm& norm, bool add) {
  const auto write = [&](const Map& x, int64_t, const Output& z) {
    bn_act(dtype, x, norm, z, device.stream);
  };
  pointwise(device, dtype, y, x, weight, norm.scale == nullptr, write, add);
}

// Products of a weight gradient that are kept at a time, or one where that is more.
constexpr int64_t kPartialBytes = int64_t(16) << 20;
// Maps that are laid out anew at a time, or one sample's where that is more.
constexpr int64_t kPackedBytes = int64_t(128) << 20;

// A sum over samples and pixels in `parts` of `length` terms, in rows of `pitch` values.
struct Contraction {
  int64_t parts, length, pitch;

  // Parts until the tiles of their products fill a large GPU; short ones cost more than they give.
  Contraction(int64_t terms, int64_t rows, int64_t columns, int64_t sum_bytes) {
    constexpr int64_t kTiles = 256, kTile = 128, kShortest = 512;
    const int64_t tiles = ceil_div(rows, kTile) * ceil_div(columns, kTile);
    parts = std::min(
        {ceil_div(kTiles, tiles), terms / kShortest, kPartialBytes / (rows * columns * sum_bytes)});
    parts = std::max(parts, int64_t(1));
    length = ceil_div(ceil_div(terms, parts), 8) * 8;  // rows start at multiples of 16 bytes
    pitch = parts * length;
  }

  // [parts, channels, length] of rows.
  Matrices of(const void* rows, int64_t channels) const {
    return {rows, parts, channels, length, length, pitch, 1};
  }
};

// dw [O, C] (+)= sum_{n, hw} dy z^T in the type of sums, folded in a fixed order; z as
// Activated's.
//
// Small weights: a product per sample, then their sum. Others: one product over samples and pixels
// in a few parts, for which z and dy are laid out channel by channel first.
// Memory: z or both maps anew, at most kPackedBytes, and at most kPartialBytes of products.
template <class Device, class Write>
void pointwise_grad_weight(Device& device, Dtype dtype, void* dw, const Map& x, const Map& dy,
                           bool plain, const Write& write, bool add) {
  const Dtype sums = sums_of(dtype);
  const int64_t pixels = x.h * x.w, size = dy.c * x.c, sum_bytes = bytes_of(sums);
  const auto contract = [&](const Matrices& a, const Matrices& b, bool onto) {
    const auto multiply = [&](void* to) {
      const Matrices out{to, a.batch, dy.c, x.c, size, x.c, 1};
      device.multiply(dtype, sums, out, a, b.transpose(), false);
    };
    if (a.batch == 1 && !onto) return multiply(dw);
    const auto products = device.allocate(a.batch * size * sum_bytes);
    multiply(products.data());
    fold_parts(dtype, products.data(), a.batch, 1, size, dw, size, onto, device.stream);
  };

  if (is_dense(dy) && (x.n == 1 || x.n * size * sum_bytes <= kPartialBytes)) {
    const Activated<Device> z(device, dtype, x, plain, write);
    return contract(matrices_of(dy), z.matrices(), add);
  }
  const int64_t sample_bytes = (x.c + dy.c) * pixels * bytes_of(dtype);
  const int64_t group = std::min(x.n, std::max(int64_t(1), kPackedBytes / sample_bytes));
  for (int64_t begin = 0; begin < x.n; begin += group) {
    const int64_t samples = std::min(group, x.n - begin), terms = samples * pixels;
    const Contraction contraction(terms, dy.c, x.c, sum_bytes);
    const auto packed = [&](Map m, const auto& write) {
      m.data = static_cast<const char*>(m.data) + begin * m.stride_n * bytes_of(dtype);
      m.n = samples;
      auto rows = device.allocate(m.c * contraction.pitch * bytes_of(dtype));
      write(m, begin, Output{rows.data(), pixels, contraction.pitch});
      zero_tails(dtype, rows.data(), m.c, contraction.pitch, terms, device.stream);
      return rows;
    };
    const auto z = packed(x, write);
    const auto g = packed(dy, [&](const Map& m, int64_t, const Output& out) {
      bn_act(dtype, m, {nullptr, nullptr, nullptr, Activation::identity}, out, device.stream);
    });
    contract(contraction.of(g.data(), dy.c), contraction.of(z.data(), x.c), add || begin > 0);
  }
}

// Likewise, z = gate h(scale x + shift).
template <class Device>
void pointwise_grad_weight(Device& device, Dtype dtype, void* dw, const Map& x, const Map& dy,
                           const Norm& norm, bool add) {
  const auto write = [&](const Map& m, int64_t begin, const Output& z) {
    bn_act(dtype, m, rows(norm, dtype, begin, x.c), z, device.stream);
  };
  pointwise_grad_weight(device, dtype, dw, x, dy, norm.scale == nullptr, write, add);
}

}  // namespace revkernels::cuda
