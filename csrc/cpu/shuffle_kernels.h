// Space to depth, its inverse and its transpose: pure data movement, by element size.
// Inside namespace REVK_ISA.
#pragma once

#include "rows.h"

// out[q pitch + j] = in[j b + q] for q < b, j < n; B is b where it is known at compile time, else
// 0.
template <class E, int B>
static void scatter_row(const E* in, int64_t step, E* out, int64_t pitch, int64_t b, int64_t n) {
  if (B > 0) b = B;
  if (step == 1 && B > 0) {
    for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 8
      for (int64_t q = 0; q < B; ++q) out[q * pitch + j] = in[j * B + q];
    }
    return;
  }
  for (int64_t q = 0; q < b; ++q) {
    for (int64_t j = 0; j < n; ++j) out[q * pitch + j] = in[(j * b + q) * step];
  }
}

// out[j b + q] = in_q[j], in_q = in + q pitch.
template <class E, int B>
static void gather_row(const E* in, int64_t pitch, int64_t step, E* out, int64_t b, int64_t n) {
  if (B > 0) b = B;
  if (step == 1 && B > 0) {
    for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 8
      for (int64_t q = 0; q < B; ++q) out[j * B + q] = in[q * pitch + j];
    }
    return;
  }
  for (int64_t q = 0; q < b; ++q) {
    for (int64_t j = 0; j < n; ++j) out[j * b + q] = in[q * pitch + j * step];
  }
}

// Unit: one row phase r of one image plane. Every copy of the plane gets the same b column phases.
template <class E>
static void space_to_depth_units(const ShuffleArgs& args, int64_t begin, int64_t end) {
  const Map& x = args.image;
  const Map& y = args.blocks;
  const int64_t b = args.block, area = y.h * y.w;
  const auto scatter = b == 2 ? scatter_row<E, 2> : b == 4 ? scatter_row<E, 4> : scatter_row<E, 0>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t r = unit % b, c = unit / b % x.c, n = unit / b / x.c;
    E* out = reinterpret_cast<E*>(element(y, n, r * b * args.planes + c));
    for (int64_t i = 0; i < y.h; ++i) {
      const E* in = reinterpret_cast<const E*>(element(x, n, c, i * b + r));
      scatter(in, x.sw, out + i * y.w, args.planes * area, b, y.w);
    }
    for (int64_t q = 0; q < b; ++q) {
      E* first = out + q * args.planes * area;
      for (int64_t p = c + x.c; p < args.planes; p += x.c) {
        memcpy(first + (p - c) * area, first, size_t(area) * sizeof(E));
      }
    }
  }
}

static void space_to_depth(const ShuffleArgs& args, int64_t begin, int64_t end) {
  switch (size_of(args.image.dtype)) {
    case 2:
      return space_to_depth_units<uint16_t>(args, begin, end);
    case 4:
      return space_to_depth_units<uint32_t>(args, begin, end);
    default:
      return space_to_depth_units<uint64_t>(args, begin, end);
  }
}

// Unit: one image plane; element (i b + r, j b + q) comes from channel (r b + q) planes + c.
template <class E>
static void depth_to_space_planes(const ShuffleArgs& args, int64_t begin, int64_t end) {
  const Map& x = args.image;
  const Map& y = args.blocks;
  const int64_t b = args.block;
  const auto gather = b == 2 ? gather_row<E, 2> : b == 4 ? gather_row<E, 4> : gather_row<E, 0>;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / x.c, c = plane % x.c;
    for (int64_t row = 0; row < x.h; ++row) {
      E* out = reinterpret_cast<E*>(element(x, n, c, row));
      const int64_t channel = depth_to_space_source(c, row, 0, args.planes, b);
      const E* in = reinterpret_cast<const E*>(element(y, n, channel, row / b));
      gather(in, args.planes * y.sc, y.w <= 1 ? 1 : y.sw, out, b, y.w);
    }
  }
}

template <class A>
static void sum_copies_planes(const ShuffleArgs& args, int64_t begin, int64_t end) {
  const Map& x = args.image;
  const Map& y = args.blocks;
  const int64_t b = args.block;
  Scratch scratch(3 * Scratch::bytes<A>(x.w));
  A* total = scratch.take<A>(x.w);
  A* row_scratch = scratch.take<A>(x.w);
  A* x_scratch = scratch.take<A>(x.w);
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / x.c, c = plane % x.c;
    for (int64_t row = 0; row < x.h; ++row) {
      char* data = element(x, n, c, row);
      A* out = row_out(x, data, x_scratch);
      for (int64_t q = 0; q < b; ++q) {
        for (int64_t j = 0; j < y.w; ++j) total[j] = 0;
        for (int64_t p = c; p < args.planes; p += x.c) {
          const int64_t channel = depth_to_space_source(p, row, q, args.planes, b);
          const A* in = row_as(y, element(y, n, channel, row / b), row_scratch, y.w);
          for (int64_t j = 0; j < y.w; ++j) total[j] += in[j];
        }
        for (int64_t j = 0; j < y.w; ++j) out[j * b + q] = total[j];
      }
      finish_row(x, out, data, x.w);
    }
  }
}

static void depth_to_space(const ShuffleArgs& args, int64_t begin, int64_t end) {
  if (args.sum_copies) {
    args.image.dtype == DType::float64 ? sum_copies_planes<double>(args, begin, end)
                                       : sum_copies_planes<float>(args, begin, end);
    return;
  }
  switch (size_of(args.image.dtype)) {
    case 2:
      return depth_to_space_planes<uint16_t>(args, begin, end);
    case 4:
      return depth_to_space_planes<uint32_t>(args, begin, end);
    default:
      return depth_to_space_planes<uint64_t>(args, begin, end);
  }
}
