// Passes over [N, C, H, W] planes for batch normalisation, hardswish and squeeze-excite.
// Inside namespace REVK_ISA.
#pragma once

#include "rows.h"

// The inputs of one plane, segment by segment, as unit-stride rows of A.
template <class A>
struct NormPlane {
  const NormArgs& args;
  int64_t n, c;
  A scale, shift;

  NormPlane(const NormArgs& a, int64_t sample, int64_t channel)
      : args(a),
        n(sample),
        c(channel),
        scale(coefficient(a.scale, n, c, A(1))),
        shift(coefficient(a.shift, n, c, A(0))) {}

  const A* row(const Map& m, int64_t r, int64_t column, A* scratch, int64_t length) const {
    return row_as(m, element(m, n, c, r, column), scratch, length);
  }
};

// Mean and sum of squared deviations of each plane: two passes over a segment in L1, segments
// merged by Chan's formula in double.
template <class A>
static void bn_moments_planes(const NormArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Map& x = args.x;
  Scratch scratch(Scratch::bytes<A>(kSegment));
  A* x_row = scratch.take<A>(kSegment);
  for_planes(begin, end, x.c, [&](int64_t plane, int64_t n, int64_t c) {
    double count = 0, mean = 0, m2 = 0;
    const NormPlane<A> p(args, n, c);
    for_segments(flat(x), x.h, x.w, [&](int64_t r, int64_t column, int64_t length) {
      const A* in = p.row(x, r, column, x_row, length);
      Vec<A> s0{}, s1{};
      int64_t i = 0;
      for (; i + 2 * L <= length; i += 2 * L) s0 += load(in + i), s1 += load(in + i + L);
      for (; i < length; i += L) s0 += load_left(in + i, length - i);
      const A segment_mean = sum_lanes<A>(s0 + s1) / A(length);
      s0 = s1 = Vec<A>{};
      for (i = 0; i + 2 * L <= length; i += 2 * L) {
        const Vec<A> d0 = load(in + i) - segment_mean, d1 = load(in + i + L) - segment_mean;
        s0 += d0 * d0, s1 += d1 * d1;
      }
      for (; i < length; i += L) {
        const Vec<A> d = first<A>(load_left(in + i, length - i) - segment_mean, length - i);
        s0 += d * d;
      }
      const double delta = double(segment_mean) - mean, total = count + double(length);
      mean += delta * double(length) / total;
      m2 += double(sum_lanes<A>(s0 + s1)) + delta * delta * count * double(length) / total;
      count = total;
    });
    args.moments[2 * plane] = mean;
    args.moments[2 * plane + 1] = m2;
  });
}

// z = gate h(scale x + shift)
template <class A, bool Hardswish>
static void bn_act_planes(const NormArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Map& x = args.x;
  Scratch scratch(2 * Scratch::bytes<A>(kSegment));
  A* x_row = scratch.take<A>(kSegment);
  A* z_row = scratch.take<A>(kSegment);
  for_planes(begin, end, x.c, [&](int64_t, int64_t n, int64_t c) {
    const NormPlane<A> p(args, n, c);
    const A gate = coefficient(args.gate, n, c, A(1));
    for_segments(flat(x), x.h, x.w, [&](int64_t r, int64_t column, int64_t length) {
      const A* in = p.row(x, r, column, x_row, length);
      char* data = element(args.out, n, c, r, column);
      A* out = row_out(args.out, data, z_row);
      for (int64_t i = 0; i < length; i += L) {
        const Vec<A> u = load_left(in + i, length - i) * p.scale + p.shift;
        store_left(out + i, (Hardswish ? hardswish_v<A>(u) : u) * gate, length - i);
      }
      finish_row(args.out, out, data, length);
    });
  });
}

// mean_{h, w} h(scale x + shift)
template <class A, bool Hardswish>
static void bn_act_squeeze_planes(const NormArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Map& x = args.x;
  Scratch scratch(Scratch::bytes<A>(kSegment));
  A* x_row = scratch.take<A>(kSegment);
  for_planes(begin, end, x.c, [&](int64_t plane, int64_t n, int64_t c) {
    const NormPlane<A> p(args, n, c);
    Vec<A> total{};
    for_segments(flat(x), x.h, x.w, [&](int64_t r, int64_t column, int64_t length) {
      const A* in = p.row(x, r, column, x_row, length);
      Vec<A> s0{}, s1{};
      int64_t i = 0;
      for (; i + 2 * L <= length; i += 2 * L) {
        const Vec<A> u0 = load(in + i) * p.scale + p.shift,
                     u1 = load(in + i + L) * p.scale + p.shift;
        s0 += Hardswish ? hardswish_v<A>(u0) : u0;
        s1 += Hardswish ? hardswish_v<A>(u1) : u1;
      }
      for (; i < length; i += L) {
        const Vec<A> u = load_left(in + i, length - i) * p.scale + p.shift;
        s0 += first<A>(Hardswish ? hardswish_v<A>(u) : u, length - i);
      }
      total += s0 + s1;  // segment by segment: many short sums round less than one long one
    });
    static_cast<A*>(args.sums)[plane] = sum_lanes<A>(total) / A(x.h * x.w);
  });
}

template <class A, bool Hardswish>
REVK_INLINE Vec<A> slope_of(Vec<A> u) {
  return Hardswish ? hardswish_slope_v<A>(u) : splat<A>(1);
}

template <class A, bool Hardswish>
REVK_INLINE void add_grad_sums(Vec<A> dz, Vec<A> u, Vec<A> slope, Vec<A> centered, Vec<A>* sums) {
  const Vec<A> slope_dz = slope * dz;
  sums[0] += dz * (Hardswish ? hardswish_v<A>(u) : u);
  sums[1] += slope_dz;
  sums[2] += slope_dz * centered;
  sums[3] += slope;
  sums[4] += slope * centered;
}

// sum dz h(u), sum dz h'(u), sum dz h'(u) (x - mean), sum h'(u), sum h'(u) (x - mean)
template <class A, bool Hardswish>
static void bn_act_grad_sums_planes(const NormArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Map& x = args.x;
  const bool is_flat = flat(x) && flat(args.dz);
  Scratch scratch(2 * Scratch::bytes<A>(kSegment));
  A* x_row = scratch.take<A>(kSegment);
  A* dz_row = scratch.take<A>(kSegment);
  for_planes(begin, end, x.c, [&](int64_t plane, int64_t n, int64_t c) {
    const NormPlane<A> p(args, n, c);
    const A mean = coefficient(args.mean, n, c, A(0));
    Vec<A> total[5] = {};
    for_segments(is_flat, x.h, x.w, [&](int64_t r, int64_t column, int64_t length) {
      const A* in = p.row(x, r, column, x_row, length);
      const A* dz_in = p.row(args.dz, r, column, dz_row, length);
      Vec<A> sums[5] = {};
      for (int64_t i = 0; i < length; i += L) {
        const int64_t left = length - i;
        const Vec<A> v = load_left(in + i, left), dz = load_left(dz_in + i, left);
        const Vec<A> u = v * p.scale + p.shift;
        Vec<A> slope = slope_of<A, Hardswish>(u);
        if (left < L) slope = first<A>(slope, left);
        add_grad_sums<A, Hardswish>(dz, u, slope, v - mean, sums);
      }
      for (int s = 0; s < 5; ++s) total[s] += sums[s];
    });
    for (int s = 0; s < 5; ++s)
      static_cast<A*>(args.sums)[s * args.sums_stride + plane] = sum_lanes<A>(total[s]);
  });
}

// dx = scale (gate dz + dpool) h'(scale x + shift) + slope x + offset
template <class A, bool Hardswish>
static void bn_act_grad_planes(const NormArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Map& x = args.x;
  const bool is_flat = flat(x) && flat(args.dz);
  Scratch scratch(3 * Scratch::bytes<A>(kSegment));
  A* x_row = scratch.take<A>(kSegment);
  A* dz_row = scratch.take<A>(kSegment);
  A* dx_row = scratch.take<A>(kSegment);
  for_planes(begin, end, x.c, [&](int64_t, int64_t n, int64_t c) {
    const NormPlane<A> p(args, n, c);
    const A gate = p.scale * coefficient(args.gate, n, c, A(1));
    const A dpool = p.scale * coefficient(args.dpool, n, c, A(0));
    const A slope = coefficient(args.slope, n, c, A(0));
    const A offset = coefficient(args.offset, n, c, A(0));
    for_segments(is_flat, x.h, x.w, [&](int64_t r, int64_t column, int64_t length) {
      const A* in = p.row(x, r, column, x_row, length);
      const A* dz = p.row(args.dz, r, column, dz_row, length);
      char* data = element(args.out, n, c, r, column);
      A* out = row_out(args.out, data, dx_row);
      for (int64_t i = 0; i < length; i += L) {
        const int64_t left = length - i;
        const Vec<A> v = load_left(in + i, left);
        Vec<A> g = load_left(dz + i, left) * gate + dpool;
        if (Hardswish) g *= hardswish_slope_v<A>(v * p.scale + p.shift);
        store_left(out + i, g + (v * slope + offset), left);
      }
      finish_row(args.out, out, data, length);
    });
  });
}

// --- tiny maps: planes side by side, a lane to each ---------------------------------------------

template <class A>
static inline bool fills_no_vector(const Map& x) {
  return x.h * x.w < kLanes<A>;
}

// Tiles of the inputs, and the coefficients of the planes at hand.
template <class A>
struct NormTiles {
  static constexpr int L = kLanes<A>;

  const NormArgs& args;
  const int64_t area;
  Scratch scratch;
  A *const x, *const dz, *const dense;

  explicit NormTiles(const NormArgs& a)
      : args(a),
        area(a.x.h * a.x.w),
        scratch(2 * Scratch::bytes<A>(tile_size<A>(area)) + Scratch::bytes<A>(area * L)),
        x(scratch.take<A>(tile_size<A>(area))),
        dz(scratch.take<A>(tile_size<A>(area))),
        dense(scratch.take<A>(area * L)) {}

  // body(v, dz) of every pixel.
  template <class Body>
  void for_pixels(int64_t n, int64_t c, int64_t count, const Body& body) {
    const bool has_dz = args.dz.data != nullptr;
    read_tile(args.x, n, c, count, dense, x);
    if (has_dz) read_tile(args.dz, n, c, count, dense, dz);
    for (int64_t p = 0; p < area * L; p += L)
      body(p, load(x + p), has_dz ? load(dz + p) : Vec<A>{});
  }
};

template <class A>
static void bn_moments_tiles(const NormArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  NormTiles<A> tiles(args);
  for_tiles<A>(begin, end, args.x.c, [&](int64_t plane, int64_t n, int64_t c, int64_t count) {
    Vec<A> sum{}, squares{};
    tiles.for_pixels(n, c, count, [&](int64_t, Vec<A> v, Vec<A>) { sum += v; });
    const Vec<A> mean = sum / A(tiles.area);
    for (int64_t p = 0; p < tiles.area * L; p += L) {
      const Vec<A> d = load(tiles.x + p) - mean;
      squares += d * d;
    }
    for (int64_t l = 0; l < count; ++l) {
      args.moments[2 * (plane + l)] = mean[l];
      args.moments[2 * (plane + l) + 1] = squares[l];
    }
  });
}

template <class A, bool Hardswish>
static void bn_act_squeeze_tiles(const NormArgs& args, int64_t begin, int64_t end) {
  NormTiles<A> tiles(args);
  for_tiles<A>(begin, end, args.x.c, [&](int64_t plane, int64_t n, int64_t c, int64_t count) {
    const Vec<A> scale = coefficients(args.scale, n, c, count, A(1));
    const Vec<A> shift = coefficients(args.shift, n, c, count, A(0));
    Vec<A> sum{};
    tiles.for_pixels(n, c, count, [&](int64_t, Vec<A> v, Vec<A>) {
      const Vec<A> u = v * scale + shift;
      sum += Hardswish ? hardswish_v<A>(u) : u;
    });
    store_left(static_cast<A*>(args.sums) + plane, sum / A(tiles.area), count);
  });
}

template <class A, bool Hardswish>
static void bn_act_grad_sums_tiles(const NormArgs& args, int64_t begin, int64_t end) {
  NormTiles<A> tiles(args);
  for_tiles<A>(begin, end, args.x.c, [&](int64_t plane, int64_t n, int64_t c, int64_t count) {
    const Vec<A> scale = coefficients(args.scale, n, c, count, A(1));
    const Vec<A> shift = coefficients(args.shift, n, c, count, A(0));
    const Vec<A> mean = coefficients(args.mean, n, c, count, A(0));
    Vec<A> sums[5] = {};
    tiles.for_pixels(n, c, count, [&](int64_t, Vec<A> v, Vec<A> dz) {
      const Vec<A> u = v * scale + shift;
      add_grad_sums<A, Hardswish>(dz, u, slope_of<A, Hardswish>(u), v - mean, sums);
    });
    for (int s = 0; s < 5; ++s) {
      store_left(static_cast<A*>(args.sums) + s * args.sums_stride + plane, sums[s], count);
    }
  });
}

template <class A, bool Hardswish>
static void bn_act_grad_tiles(const NormArgs& args, int64_t begin, int64_t end) {
  NormTiles<A> tiles(args);
  for_tiles<A>(begin, end, args.x.c, [&](int64_t, int64_t n, int64_t c, int64_t count) {
    const Vec<A> scale = coefficients(args.scale, n, c, count, A(1));
    const Vec<A> shift = coefficients(args.shift, n, c, count, A(0));
    const Vec<A> gate = scale * coefficients(args.gate, n, c, count, A(1));
    const Vec<A> dpool = scale * coefficients(args.dpool, n, c, count, A(0));
    const Vec<A> slope = coefficients(args.slope, n, c, count, A(0));
    const Vec<A> offset = coefficients(args.offset, n, c, count, A(0));
    tiles.for_pixels(n, c, count, [&](int64_t p, Vec<A> v, Vec<A> dz) {
      Vec<A> g = dz * gate + dpool;
      if (Hardswish) g *= hardswish_slope_v<A>(v * scale + shift);
      store(tiles.x + p, g + (v * slope + offset));
    });
    write_tile(args.out, n, c, count, tiles.dense, tiles.x);
  });
}

template <class A>
static void bn_act_as(const NormArgs& args, int64_t begin, int64_t end) {
  args.act == Activation::hardswish ? bn_act_planes<A, true>(args, begin, end)
                                    : bn_act_planes<A, false>(args, begin, end);
}

template <class A>
static void bn_moments_as(const NormArgs& args, int64_t begin, int64_t end) {
  fills_no_vector<A>(args.x) ? bn_moments_tiles<A>(args, begin, end)
                             : bn_moments_planes<A>(args, begin, end);
}

#define REVK_NORM_BY_SIZE(name)                                                     \
  template <class A, bool Hardswish>                                                \
  static void name##_by_size(const NormArgs& args, int64_t begin, int64_t end) {    \
    fills_no_vector<A>(args.x) ? name##_tiles<A, Hardswish>(args, begin, end)       \
                               : name##_planes<A, Hardswish>(args, begin, end);     \
  }                                                                                 \
  template <class A>                                                                \
  static void name##_as(const NormArgs& args, int64_t begin, int64_t end) {         \
    args.act == Activation::hardswish ? name##_by_size<A, true>(args, begin, end)   \
                                      : name##_by_size<A, false>(args, begin, end); \
  }
REVK_NORM_BY_SIZE(bn_act_squeeze)
REVK_NORM_BY_SIZE(bn_act_grad_sums)
REVK_NORM_BY_SIZE(bn_act_grad)
#undef REVK_NORM_BY_SIZE

#define REVK_NORM(name)                                                                   \
  static void name(const NormArgs& args, int64_t begin, int64_t end) {                    \
    args.wide ? name##_as<double>(args, begin, end) : name##_as<float>(args, begin, end); \
  }
REVK_NORM(bn_moments)
REVK_NORM(bn_act)
REVK_NORM(bn_act_squeeze)
REVK_NORM(bn_act_grad_sums)
REVK_NORM(bn_act_grad)
#undef REVK_NORM
