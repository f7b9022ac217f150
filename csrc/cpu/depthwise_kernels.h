// Depthwise convolution and its two gradients. Inside namespace REVK_ISA.
//
// The network's kernels (k = 3, 5 with stride 1; 3, 5 with 2; 7 with 4; 15 with 8) read rows where
// they are: masked loads supply the zero padding, a row of zeros stands for rows outside the map,
// and a strided row is split into its column phases in registers. Any other kernel and stride goes
// through planes of phases in memory, where output o of the flat plane is sum_t w[t] x[o +
// offset[t]].
#pragma once

#include "rows.h"

// The input of one unit as rows of A: the map itself, or a copy that is converted, made
// unit-stride, or transformed to hardswish(scale x + shift).
template <class A>
static Plane<A> input_plane(const DepthwiseArgs& args, int64_t n, int64_t c, A* dense) {
  const Map& x = args.in;
  Plane<A> plane = plane_as(x, n, c, dense);
  if (args.scale.data == nullptr) return plane;
  const A scale = coefficient(args.scale, 0, c, A(1)), shift = coefficient(args.shift, 0, c, A(0));
  const bool is_flat = plane.pitch == x.w || x.h <= 1;
  for_segments(is_flat, x.h, x.w, [&](int64_t row, int64_t column, int64_t length) {
    const A* in = plane.data + row * plane.pitch + column;
    A* out = dense + row * x.w + column;
    for (int64_t i = 0; i < length; i += kLanes<A>) {
      const int64_t left = length - i;
      store_left(out + i, hardswish_v<A>(load_left(in + i, left) * scale + shift), left);
    }
  });
  return {dense, x.w};
}

// Elements of scratch that input_plane needs.
template <class A>
static inline int64_t copied(const Map& m, bool transformed) {
  return direct<A>(m) && !transformed ? 0 : m.h * m.w;
}

template <class A>
static inline const A* row_or_zeros(const Plane<A>& plane, int64_t row, int64_t rows,
                                    const A* zeros) {
  return row >= 0 && row < rows ? plane.data + row * plane.pitch : zeros;
}

// Row by row there are too few loads in flight to stream from memory: rows are fetched this far
// ahead.
constexpr int64_t kRowsAhead = 8;

template <class A>
REVK_INLINE void prefetch_row(const Plane<A>& plane, int64_t row, int64_t n) {
  const A* ahead = plane.data + (row + kRowsAhead) * plane.pitch;
  for (int64_t x = 0; x < n; x += 64 / int64_t(sizeof(A))) __builtin_prefetch(ahead + x);
}

// --- stride 1 ---------------------------------------------------------------------------------

// Rows in a block: enough sums in flight to hide the latency of an addition, with K weights in
// registers.
constexpr int kRowBlock = REVK_BYTES == 64 ? 12 : 8;

// R rows of outputs. Column by column of taps, every loaded vector serves all the rows that it
// reaches.
template <class A, int K, int R>
static void convolve_rows(const A* const* in, const Mask<A>* masks, const A* w, A* const* out,
                          int64_t width) {
  for (int64_t j = 0; j < width; j += kLanes<A>, masks += K) {
    Vec<A> acc[R] = {};
#pragma GCC unroll 8
    for (int v = 0; v < K; ++v) {
      Vec<A> taps[K];
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u) taps[u] = splat(w[u * K + v]);
#pragma GCC unroll 16
      for (int i = 0; i < R + K - 1; ++i) {
        const Vec<A> x = load(in[i] + j + v - K / 2, masks[v]);
#pragma GCC unroll 8
        for (int u = 0; u < K; ++u) {
          if (i - u >= 0 && i - u < R) acc[i - u] += x * taps[u];
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store_left(out[r] + j, acc[r], width - j);
  }
}

template <class A, int K, int... Rows>
static void convolve_block(std::integer_sequence<int, Rows...>, int64_t rows, const A* const* in,
                           const Mask<A>* masks, const A* w, A* const* out, int64_t width) {
  constexpr decltype(&convolve_rows<A, K, 1>) kernels[] = {convolve_rows<A, K, Rows + 1>...};
  kernels[rows - 1](in, masks, w, out, width);
}

template <class A, int K>
static void convolve_planes(const DepthwiseArgs& args, bool flip, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>, R = kRowBlock;
  const Map& x = args.in;
  const Map& y = args.out;
  const int64_t vectors = ceil_div(x.w, L), dense_size = copied<A>(x, args.scale.data != nullptr);
  Scratch scratch(Scratch::bytes<A>(dense_size) + Scratch::bytes<A>(R * y.w) +
                  Scratch::bytes<A>(x.w) + Scratch::bytes<Mask<A>>(vectors * K));
  A* dense = scratch.take<A>(dense_size);
  A* out_scratch = scratch.take<A>(R * y.w);
  const A* zeros = scratch.zeros<A>(x.w);
  Mask<A>* masks = scratch.take<Mask<A>>(vectors * K);
  for (int64_t i = 0; i < vectors * K; ++i) {
    const int64_t column = i / K * L + i % K - K / 2;
    masks[i] = lanes_between<A>(-column, x.w - column);
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / x.c, c = unit % x.c;
    const A* weight = static_cast<const A*>(args.weight) + c * K * K;
    A w[K * K];
    for (int t = 0; t < K * K; ++t) w[t] = weight[flip ? K * K - 1 - t : t];
    const Plane<A> plane = input_plane(args, n, c, dense);
    char* data = element(y, n, c);
    const int64_t blocks = ceil_div(y.h, R);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t i = y.h * block / blocks, rows = y.h * (block + 1) / blocks - i;
      const A* in[R + K - 1];
      A* out[R];
#pragma GCC unroll 16
      for (int r = 0; r < R + K - 1; ++r) in[r] = row_or_zeros(plane, i + r - K / 2, x.h, zeros);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        out[r] = direct<A>(y) ? reinterpret_cast<A*>(data) + (i + r) * y.w : out_scratch + r * y.w;
      }
      convolve_block<A, K>(std::make_integer_sequence<int, R>(), rows, in, masks, w, out, y.w);
      if (!direct<A>(y)) write_row(y, out_scratch, element(y, n, c, i), rows * y.w);
    }
  }
}

// dw[u, v] += sum_ij dy[i, j] x[i + u - P, j + v - P]; U rows of taps stay in registers at a time.
template <class A, int K, int U>
static void correlate_rows(const Plane<A>& x, const Plane<A>& dy, int64_t h, int64_t w,
                           const A* zeros, const Mask<A>* masks, int u0, Vec<A>* sums) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[U * K];
#pragma GCC unroll 32
  for (int t = 0; t < U * K; ++t) acc[t] = Vec<A>{};
  for (int64_t j = 0; j < w; j += L) {
    const Mask<A>* m = masks + j / L * (K + 1);
    for (int64_t i = 0; i < h; ++i) {
      if (j == 0 && u0 == 0) prefetch_row(x, i, w), prefetch_row(dy, i, w);
      const A* row = x.data + i * x.pitch + j - K / 2;
      Vec<A> g[U];
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u)
        g[u] = load(row_or_zeros(dy, i + K / 2 - u0 - u, h, zeros) + j, m[K]);
#pragma GCC unroll 8
      for (int v = 0; v < K; ++v) {
        const Vec<A> in = load(row + v, m[v]);
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) acc[u * K + v] += g[u] * in;
      }
    }
  }
#pragma GCC unroll 32
  for (int t = 0; t < U * K; ++t) sums[u0 * K + t] += acc[t];
}

template <class A, int K>
static void correlate_planes(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  constexpr int U =
      REVK_BYTES == 64 || K == 3 ? K : 1;  // U K sums and U + 1 operands in 32 or 16 registers
  const Map& x = args.in;
  const Map& dy = args.dy;
  const int64_t vectors = ceil_div(x.w, L);
  const int64_t x_size = copied<A>(x, args.scale.data != nullptr), dy_size = copied<A>(dy, false);
  Scratch scratch(Scratch::bytes<A>(x_size) + Scratch::bytes<A>(dy_size) + Scratch::bytes<A>(x.w) +
                  Scratch::bytes<Mask<A>>(vectors * (K + 1)));
  A* x_dense = scratch.take<A>(x_size);
  A* dy_dense = scratch.take<A>(dy_size);
  const A* zeros = scratch.zeros<A>(x.w);
  Mask<A>* masks = scratch.take<Mask<A>>(vectors * (K + 1));  // of the shifted x, then of dy
  for (int64_t i = 0; i < vectors * (K + 1); ++i) {
    const int64_t column = i / (K + 1) * L + (i % (K + 1) == K ? 0 : i % (K + 1) - K / 2);
    masks[i] = lanes_between<A>(-column, x.w - column);
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t c = unit % x.c, first_sample = unit / x.c * kSamplesPerPartial;
    const int64_t last =
        first_sample + kSamplesPerPartial < x.n ? first_sample + kSamplesPerPartial : x.n;
    Vec<A> sums[K * K] = {};
    for (int64_t n = first_sample; n < last; ++n) {
      const Plane<A> x_plane = input_plane(args, n, c, x_dense),
                     dy_plane = plane_as(dy, n, c, dy_dense);
      for (int u0 = 0; u0 < K; u0 += U) {
        correlate_rows<A, K, U>(x_plane, dy_plane, x.h, x.w, zeros, masks, u0, sums);
      }
    }
    A* out = static_cast<A*>(args.partial) + unit * K * K;
    for (int t = 0; t < K * K; ++t) out[t] = sum_lanes<A>(sums[t]);
  }
}

// --- stride S ---------------------------------------------------------------------------------

// T = ceil(k / s) outputs read a column. A vector holds that many fewer outputs than lanes less
// one, so that the taps of phase v + S are those of phase v, one lane further.
template <class A, int K, int S>
constexpr int kOutputs = kLanes<A> - (K + S - 1) / S + 1;

// Masks of the S vectors that split_row reads, for every vector of outputs of a row of w columns.
template <class A, int K, int S>
static void split_masks(int64_t w, int64_t vectors, Mask<A>* masks) {
  for (int64_t i = 0; i < vectors * S; ++i) {
    const int64_t column = i / S * S * kOutputs<A, K, S> + i % S * kLanes<A> - K / 2;
    masks[i] = lanes_between<A>(-column, w - column);
  }
}

// x[v] = row[S l + v], v < K, in lanes l < kOutputs.
template <class A, int K, int S>
REVK_INLINE void split_row(const A* row, const Mask<A>* masks, Vec<A>* x) {
  Vec<A> phase[S];
#pragma GCC unroll 8
  for (int i = 0; i < S; ++i) phase[i] = load(row + i * kLanes<A>, masks[i]);
  split<A, S>(phase);
#pragma GCC unroll 16
  for (int v = 0; v < K; ++v) x[v] = v < S ? phase[v] : permute<A>(phase[v % S], iota<A>() + v / S);
}

// Padded row S m + a reaches output m - t through the taps of row a + S t: T outputs are open at a
// time.
template <class A, int K, int S>
static void convolve_strided(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kOutputs<A, K, S>, P = K / 2, T = (K + S - 1) / S;
  const Map& x = args.in;
  const Map& y = args.out;
  const int64_t vectors = ceil_div(y.w, L), dense_size = copied<A>(x, args.scale.data != nullptr);
  const int64_t out_size = direct<A>(y) ? 0 : y.h * y.w;
  Scratch scratch(Scratch::bytes<A>(dense_size) + Scratch::bytes<A>(out_size) +
                  Scratch::bytes<Mask<A>>(vectors * S));
  A* dense = scratch.take<A>(dense_size);
  A* out_scratch = scratch.take<A>(out_size);
  Mask<A>* masks = scratch.take<Mask<A>>(vectors * S);
  split_masks<A, K, S>(x.w, vectors, masks);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / x.c, c = unit % x.c;
    const A* w = static_cast<const A*>(args.weight) + c * K * K;
    const Plane<A> plane = input_plane(args, n, c, dense);
    char* data = element(y, n, c);
    A* out = direct<A>(y) ? reinterpret_cast<A*>(data) : out_scratch;
    for (int64_t j = 0; j < y.w; j += L) {
      Vec<A> open[T] = {};
      for (int64_t m = 0; m < y.h + T - 1; ++m) {
        for (int a = 0; a < S; ++a) {
          const int64_t h = S * m + a - P;
          if (h < 0 || h >= x.h) continue;
          Vec<A> in[K];
          if (j == 0) prefetch_row(plane, h, x.w);
          split_row<A, K, S>(plane.data + h * plane.pitch + S * j - P, masks + j / L * S, in);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            if (a + S * t >= K) continue;
            Vec<A> sum = in[0] * w[(a + S * t) * K];
#pragma GCC unroll 16
            for (int v = 1; v < K; ++v) sum += in[v] * w[(a + S * t) * K + v];
            open[t] += sum;
          }
        }
        if (m >= T - 1)
          store(out + (m - T + 1) * y.w + j, open[T - 1],
                first_lanes<A>(y.w - j < L ? y.w - j : L));
#pragma GCC unroll 4
        for (int t = T - 1; t > 0; --t) open[t] = open[t - 1];
        open[0] = Vec<A>{};
      }
    }
    if (!direct<A>(y)) write_row(y, out, data, y.h * y.w);
  }
}

template <class A, int K, int S>
static void correlate_strided(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kOutputs<A, K, S>, P = K / 2, T = (K + S - 1) / S;
  const Map& x = args.in;
  const Map& dy = args.dy;
  const int64_t vectors = ceil_div(dy.w, L);
  const int64_t x_size = copied<A>(x, args.scale.data != nullptr), dy_size = copied<A>(dy, false);
  Scratch scratch(Scratch::bytes<A>(x_size) + Scratch::bytes<A>(dy_size) +
                  Scratch::bytes<Mask<A>>(vectors * S));
  A* x_dense = scratch.take<A>(x_size);
  A* dy_dense = scratch.take<A>(dy_size);
  Mask<A>* masks = scratch.take<Mask<A>>(vectors * S);
  split_masks<A, K, S>(x.w, vectors, masks);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t c = unit % x.c, first_sample = unit / x.c * kSamplesPerPartial;
    const int64_t last =
        first_sample + kSamplesPerPartial < x.n ? first_sample + kSamplesPerPartial : x.n;
    Vec<A> sums[K * K];
#pragma GCC unroll 32
    for (int t = 0; t < K * K; ++t) sums[t] = Vec<A>{};
    for (int64_t n = first_sample; n < last; ++n) {
      const Plane<A> x_plane = input_plane(args, n, c, x_dense),
                     dy_plane = plane_as(dy, n, c, dy_dense);
      for (int64_t j = 0; j < dy.w; j += L) {
        const Mask<A> dy_mask = first_lanes<A>(dy.w - j < L ? dy.w - j : L);
        const Mask<A>* m_x = masks + j / L * S;
        for (int64_t m = 0; m < dy.h + T - 1; ++m) {
          Vec<A> g[T];  // of outputs m - t
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            const bool exists = m - t >= 0 && m - t < dy.h;
            g[t] = exists ? load(dy_plane.data + (m - t) * dy_plane.pitch + j, dy_mask) : Vec<A>{};
          }
#pragma GCC unroll 2
          for (int a = 0; a < S; ++a) {
            const int64_t h = S * m + a - P;
            if (h < 0 || h >= x.h) continue;
            Vec<A> in[K];
            if (j == 0) prefetch_row(x_plane, h, x.w);
            split_row<A, K, S>(x_plane.data + h * x_plane.pitch + S * j - P, m_x, in);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
              if (a + S * t >= K) continue;
#pragma GCC unroll 16
              for (int v = 0; v < K; ++v) sums[(a + S * t) * K + v] += g[t] * in[v];
            }
          }
        }
      }
    }
    A* out = static_cast<A*>(args.partial) + unit * K * K;
#pragma GCC unroll 32
    for (int t = 0; t < K * K; ++t) out[t] = sum_lanes<A>(sums[t]);
  }
}

// dv[h, x] = sum_{t, q} w[a + S t, b + S q] dy[m - t, (x + P) / S - q], h + P = S m + a, x + P = b
// mod S. A vector of x takes the dy pixels of its lanes once for the S rows of the same m; weights
// lie per lane.
template <class A, int K, int S>
static void grad_input_strided(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>, P = K / 2, T = (K + S - 1) / S;
  static_assert(L % S == 0, "the weights of every vector are the same");
  const Map& dy = args.in;
  const Map& dv = args.out;
  const int64_t vectors = ceil_div(dv.w, L), dense_size = copied<A>(dy, false);
  const int64_t out_size = direct<A>(dv) ? 0 : S * dv.w;
  Scratch scratch(Scratch::bytes<A>(dense_size) + Scratch::bytes<A>(out_size) +
                  Scratch::bytes<A>(dy.w + L) + Scratch::bytes<A>(K * T * L) +
                  Scratch::bytes<Mask<A>>(vectors * T));
  A* dense = scratch.take<A>(dense_size);
  A* out_scratch = scratch.take<A>(out_size);
  const A* zeros = scratch.zeros<A>(dy.w + L);
  A* w = scratch.take<A>(K * T * L);
  Mask<A>* masks = scratch.take<Mask<A>>(vectors * T);
  for (int64_t i = 0; i < vectors * T; ++i) {
    const int64_t column = (i / T * L + P) / S - i % T;
    masks[i] = lanes_between<A>(-column, dy.w - column);
  }
  IVec<A> lanes{}, taps{};
  for (int l = 0; l < L; ++l) lanes[l] = (l + P) / S - P / S, taps[l] = (l + P) % S;

  int64_t channel = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t c = unit / dv.n, n = unit % dv.n;
    if (c != channel) {
      const A* weight = static_cast<const A*>(args.weight) + c * K * K;
      for (int u = 0; u < K; ++u) {
        for (int t = 0; t < T; ++t) {
          const Vec<A> row = load_left(weight + u * K + t * S, K - t * S);
          store(w + (u * T + t) * L, permute<A>(row, taps));
        }
      }
      channel = c;
    }
    const Plane<A> plane = plane_as(dy, n, c, dense);
    A* out = direct<A>(dv) ? reinterpret_cast<A*>(element(dv, n, c)) : nullptr;
    for (int64_t m = P / S; m <= (dv.h - 1 + P) / S; ++m) {
      const int64_t h = S * m - P;  // of a = 0
      const int64_t a_begin = h < 0 ? -h : 0, a_end = dv.h - h < S ? dv.h - h : S;
      const A* rows[T];
      for (int t = 0; t < T; ++t) rows[t] = row_or_zeros(plane, m - t, dy.h, zeros);
      A* base = out ? out + h * dv.w : out_scratch;
      for (int64_t x = 0; x < dv.w; x += L) {
        const int64_t first = (x + P) / S;
        Vec<A> pixels[T * T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
          for (int q = 0; q < T; ++q) {
            // A row of zeros may be read anywhere, a row of dy only where the mask says.
            pixels[t * T + q] = permute<A>(load(rows[t] + first - q, masks[x / L * T + q]), lanes);
          }
        }
        const auto put_row = [&](int64_t a) {
          Vec<A> sum{};
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            if (a + S * t >= K) continue;
            const A* weight = w + (a + S * t) * T * L;
#pragma GCC unroll 4
            for (int q = 0; q < T; ++q) sum += load(weight + q * L) * pixels[t * T + q];
          }
          store_left(base + a * dv.w + x, sum, dv.w - x);
        };
        if (a_begin == 0 && a_end == S) {
#pragma GCC unroll 8
          for (int a = 0; a < S; ++a) put_row(a);
        } else {
          for (int64_t a = a_begin; a < a_end; ++a) put_row(a);
        }
      }
      if (!out)
        write_row(dv, base + a_begin * dv.w, element(dv, n, c, h + a_begin),
                  (a_end - a_begin) * dv.w);
    }
  }
}

// --- any kernel and stride: phases ------------------------------------------------------------

template <class A>
static void copy_zero_padded(const A* src, A* dst, int64_t n) {
  for (int64_t x = 0; x < n; x += kLanes<A>) store(dst + x, load_left(src + x, n - x));
}

// The padded plane x[hp, wp], hp = h + P, split into phases (hp mod s, wp mod s), each [rows,
// pitch].
struct Phases {
  int64_t k, s, pad, reach, out_h, out_w, rows, pitch, size;

  Phases(int64_t h, int64_t w, int64_t kernel, int64_t stride, int64_t lanes)
      : k(kernel),
        s(stride),
        pad((kernel - 1) / 2),
        reach(ceil_div(kernel, stride) - 1),
        out_h(depthwise_out_size(h, stride)),
        out_w(depthwise_out_size(w, stride)),
        rows(out_h + reach),
        pitch(out_w + reach),
        size(ceil_div(rows * pitch + lanes, lanes) * lanes) {}

  int64_t line(int64_t lanes) const { return s * (pitch + lanes); }
  int64_t offset(int64_t u, int64_t v) const {
    return ((u % s) * s + v % s) * size + (u / s) * pitch + v / s;
  }
};

// `line` is zeros beyond what a row writes; rows come in ascending order, so that the zeros that
// one row spills behind its end are overwritten or belong there.
template <class A>
static void split_plane(const Map& x, const Plane<A>& plane, const Phases& ph, A* line, A* phases) {
  const int64_t columns = (ph.out_w - 1) * ph.s + ph.k - ph.pad;  // the last that any tap reads
  const int64_t rows = (ph.out_h - 1) * ph.s + ph.k - ph.pad;
  const int64_t w = x.w < columns ? x.w : columns, h_end = x.h < rows ? x.h : rows;
  for (int64_t h = 0; h < h_end; ++h) {
    const int64_t hp = h + ph.pad;
    A* dst = phases + (hp % ph.s) * ph.s * ph.size + (hp / ph.s) * ph.pitch;
    copy_zero_padded(plane.data + h * plane.pitch, line + ph.pad, w);
    deinterleave(line, dst, ph.size, ph.pitch, ph.s);
  }
}

// out[o .. o + B lanes) = sum_t w[t] x[o + offset[t]]
template <class A, int B>
static inline void filter_block(const A* x, const int64_t* offset, const A* w, int64_t taps,
                                A* out) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) acc[b] = Vec<A>{};
  for (int64_t t = 0; t < taps; ++t) {
    const A* in = x + offset[t];
    const Vec<A> weight = splat(w[t]);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) acc[b] += load(in + b * L) * weight;
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) store(out + b * L, acc[b]);
}

template <class A>
static void convolve_phases(const DepthwiseArgs& args, bool flip, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Map& x = args.in;
  const Map& y = args.out;
  const int64_t k = args.kernel, s = args.stride, taps = k * k;
  const Phases ph(x.h, x.w, k, s, L);
  const int64_t length = ph.out_h * ph.pitch;
  Scratch scratch(Scratch::bytes<A>(s * s * ph.size + ph.reach + 4 * L) +
                  Scratch::bytes<A>(length + 4 * L) + Scratch::bytes<A>(ph.line(L)) +
                  Scratch::bytes<A>(x.h * x.w) + Scratch::bytes<A>(taps) +
                  Scratch::bytes<int64_t>(taps));
  A* phases = scratch.zeros<A>(s * s * ph.size + ph.reach + 4 * L);
  A* out_rows = scratch.take<A>(length + 4 * L);
  A* line = scratch.zeros<A>(ph.line(L));
  A* dense = scratch.take<A>(x.h * x.w);
  A* w = scratch.take<A>(taps);
  int64_t* offset = scratch.take<int64_t>(taps);
  for (int64_t t = 0; t < taps; ++t) offset[t] = ph.offset(t / k, t % k);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / x.c, c = unit % x.c;
    const A* weight = static_cast<const A*>(args.weight) + c * taps;
    for (int64_t t = 0; t < taps; ++t) w[t] = weight[flip ? taps - 1 - t : t];
    split_plane(x, input_plane(args, n, c, dense), ph, line, phases);
    int64_t o = 0;
    for (; o + 3 * L < length; o += 4 * L)
      filter_block<A, 4>(phases + o, offset, w, taps, out_rows + o);
    for (; o + L < length; o += 2 * L)
      filter_block<A, 2>(phases + o, offset, w, taps, out_rows + o);
    for (; o < length; o += L) filter_block<A, 1>(phases + o, offset, w, taps, out_rows + o);
    for (int64_t i = 0; i < y.h; ++i) {
      char* data = element(y, n, c, i);
      write_row(y, out_rows + i * ph.pitch, data, y.w);
    }
  }
}

template <class A>
static void correlate_phases(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>, B = REVK_BYTES == 64 ? 8 : 4;
  const Map& x = args.in;
  const Map& dy = args.dy;
  const int64_t k = args.kernel, s = args.stride, taps = k * k;
  const Phases ph(x.h, x.w, k, s, L);
  const int64_t length = ph.out_h * ph.pitch;
  const int64_t padded_taps = ceil_div(taps, B) * B;
  Scratch scratch(Scratch::bytes<A>(s * s * ph.size + ph.reach + L) +
                  Scratch::bytes<A>(length + 2 * L) + Scratch::bytes<A>(ph.line(L)) +
                  Scratch::bytes<A>(x.h * x.w) + Scratch::bytes<A>(padded_taps * L) +
                  Scratch::bytes<int64_t>(padded_taps));
  A* phases = scratch.zeros<A>(s * s * ph.size + ph.reach + L);
  A* dy_flat = scratch.zeros<A>(length + 2 * L);
  A* line = scratch.zeros<A>(ph.line(L));
  A* dense = scratch.take<A>(x.h * x.w);
  A* sums = scratch.take<A>(padded_taps * L);
  int64_t* offset = scratch.zeros<int64_t>(padded_taps);
  for (int64_t t = 0; t < taps; ++t) offset[t] = ph.offset(t / k, t % k);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t c = unit % x.c, first_sample = unit / x.c * kSamplesPerPartial;
    const int64_t last =
        first_sample + kSamplesPerPartial < x.n ? first_sample + kSamplesPerPartial : x.n;
    clear(sums, padded_taps * L);
    for (int64_t n = first_sample; n < last; ++n) {
      split_plane(x, input_plane(args, n, c, dense), ph, line, phases);
      for (int64_t i = 0; i < ph.out_h; ++i) {
        const A* row = row_as(dy, element(dy, n, c, i), dense, dy.w);
        copy_zero_padded(row, dy_flat + i * ph.pitch, dy.w);
      }
      for (int64_t t = 0; t < taps; t += B) {
        Vec<A> acc[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) acc[b] = load(sums + (t + b) * L);
        for (int64_t o = 0; o < length; o += L) {
          const Vec<A> g = load(dy_flat + o);
#pragma GCC unroll 8
          for (int b = 0; b < B; ++b) acc[b] += g * load(phases + o + offset[t + b]);
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) store(sums + (t + b) * L, acc[b]);
      }
    }
    A* out = static_cast<A*>(args.partial) + unit * taps;
    for (int64_t t = 0; t < taps; ++t) out[t] = sum_lanes<A>(load(sums + t * L));
  }
}

// The same formula for any k and s, T = ceil(k / s): weights repeat every s / gcd(s, lanes)
// vectors.
template <class A>
static void grad_input_phases(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Map& dy = args.in;
  const Map& dv = args.out;
  const int64_t k = args.kernel, s = args.stride, pad = (k - 1) / 2;
  const int64_t reach = ceil_div(k, s);
  int64_t patterns = s;
  while (patterns % 2 == 0 && patterns * L % (2 * s) == 0) patterns /= 2;
  const int64_t last_m = (dv.h - 1 + pad) / s, last_q = (dv.w - 1 + pad) / s;
  const int64_t rows = reach + (last_m + 1 > dy.h ? last_m + 1 : dy.h);
  const int64_t pitch = reach + (last_q + 1 > dy.w ? last_q + 1 : dy.w) + 2 * L;
  const int64_t weights = s * reach * reach * patterns * L;
  Scratch scratch(Scratch::bytes<A>(rows * pitch) + Scratch::bytes<A>(weights) +
                  2 * Scratch::bytes<A>(dv.w) + Scratch::bytes<IVec<A>>(patterns) +
                  Scratch::bytes<Vec<A>>(reach * reach) +
                  Scratch::bytes<int64_t>(ceil_div(dv.w, L)));
  A* padded = scratch.zeros<A>(rows * pitch);
  A* w = scratch.take<A>(weights);
  A* dy_scratch = scratch.take<A>(dv.w);
  A* dv_scratch = scratch.take<A>(dv.w);
  IVec<A>* lanes = scratch.take<IVec<A>>(patterns);
  Vec<A>* pixels = scratch.take<Vec<A>>(reach * reach);
  int64_t* first_q = scratch.take<int64_t>(ceil_div(dv.w, L));
  for (int64_t p = 0; p < patterns; ++p) {
    for (int l = 0; l < L; ++l) lanes[p][l] = (p * L + l + pad) / s - (p * L + pad) / s;
  }
  for (int64_t x = 0; x < dv.w; x += L) first_q[x / L] = (x + pad) / s;
  const A* origin = padded + (reach - 1) * (pitch + 1);  // of dy[0, 0]

  int64_t channel = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t c = unit / dv.n, n = unit % dv.n;
    if (c != channel) {
      const A* weight = static_cast<const A*>(args.weight) + c * k * k;
      for (int64_t u = 0; u < s * reach; ++u) {
        for (int64_t t = 0; t < reach; ++t) {
          A* out = w + (u * reach + t) * patterns * L;
          for (int64_t l = 0, b = pad % s; l < patterns * L; ++l, b = b + 1 == s ? 0 : b + 1) {
            const int64_t v = b + s * t;
            out[l] = u < k && v < k ? weight[u * k + v] : A(0);
          }
        }
      }
      channel = c;
    }
    for (int64_t i = 0; i < dy.h; ++i) {
      const A* row = row_as(dy, element(dy, n, c, i), dy_scratch, dy.w);
      copy_zero_padded(row, padded + (reach - 1 + i) * pitch + reach - 1, dy.w);
    }
    for (int64_t m = pad / s; m <= last_m; ++m) {
      const int64_t a_begin = pad > m * s ? pad - m * s : 0;
      const int64_t a_end = dv.h + pad - m * s < s ? dv.h + pad - m * s : s;
      const bool in_place = direct<A>(dv);
      // Without rows of A to write to, one row at a time goes through scratch.
      for (int64_t a0 = a_begin; a0 < a_end; a0 = in_place ? a_end : a0 + 1) {
        const int64_t a1 = in_place ? a_end : a0 + 1;
        char* data = element(dv, n, c, m * s + a0 - pad);
        A* out = row_out(dv, data, dv_scratch);
        for (int64_t x = 0; x < dv.w; x += L) {
          const int64_t part = patterns == 1 ? 0 : x / L % patterns;
          const A* in = origin + m * pitch + first_q[x / L];
          for (int64_t t = 0; t < reach; ++t) {
            for (int64_t q = 0; q < reach; ++q) {
              pixels[t * reach + q] = permute<A>(load(in - t * pitch - q), lanes[part]);
            }
          }
          for (int64_t a = a0; a < a1; ++a) {
            Vec<A> sum{};
            for (int64_t t = 0; t < reach; ++t) {
              for (int64_t q = 0; q < reach; ++q) {
                const A* weight = w + (((a + s * t) * reach + q) * patterns + part) * L;
                sum += load(weight) * pixels[t * reach + q];
              }
            }
            store_left(out + (a - a0) * dv.sh + x, sum, dv.w - x);
          }
        }
        finish_row(dv, out, data, dv.w);
      }
    }
  }
}

// --- tiny maps: planes side by side -----------------------------------------------------------

// One dimension of a convolution that has `size` inputs: taps begin to end of output i are inside.
struct Taps {
  int64_t begin, end, input;  // input: of tap 0

  Taps(const DepthwiseArgs& args, int64_t i, int64_t size) {
    input = i * args.stride - (args.kernel - 1) / 2;
    begin = input < 0 ? -input : 0;
    end = smaller(args.kernel, size - input);
  }
};

// Channels' planes of x and filters in tiles, and room for as many planes.
template <class A>
class DepthwiseTiles {
 public:
  static constexpr int L = kLanes<A>;

  explicit DepthwiseTiles(const DepthwiseArgs& args, const Map& second)
      : args_(args),
        taps_(args.kernel * args.kernel),
        room_(larger(args.in.h * args.in.w, second.h * second.w)),
        scratch_(2 * Scratch::bytes<A>(tile_size<A>(room_)) + Scratch::bytes<A>(room_ * L) +
                 Scratch::bytes<A>(tile_size<A>(taps_))),
        in(scratch_.take<A>(tile_size<A>(room_))),
        second(scratch_.take<A>(tile_size<A>(room_))),
        dense(scratch_.take<A>(room_ * L)),
        filter(scratch_.take<A>(tile_size<A>(taps_))) {}

  void read_input(int64_t n, int64_t c, int64_t count) {
    const Map& x = args_.in;
    read_tile(x, n, c, count, dense, in);
    if (args_.scale.data == nullptr) return;
    const Vec<A> scale = coefficients(args_.scale, 0, c, count, A(1));
    const Vec<A> shift = coefficients(args_.shift, 0, c, count, A(0));
    for (int64_t p = 0; p < x.h * x.w; ++p) {
      store(in + p * L, hardswish_v<A>(load(in + p * L) * scale + shift));
    }
  }

  void read_filter(int64_t c, int64_t count) {
    if (c == filter_channel_ && count == filter_count_) return;
    filter_channel_ = c, filter_count_ = count;
    const A* rows[L];
    for (int64_t l = 0; l < count; ++l) {
      rows[l] = static_cast<const A*>(args_.weight) + (c + l) * taps_;
    }
    rows_to_tile(rows, count, taps_, filter);
  }

  void write_filter(A* out, int64_t count) const {
    A* rows[L];
    for (int64_t l = 0; l < count; ++l) rows[l] = out + l * taps_;
    tile_to_rows(filter, count, taps_, rows);
  }

 private:
  const DepthwiseArgs& args_;
  const int64_t taps_, room_;
  int64_t filter_channel_ = 0, filter_count_ = 0;
  Scratch scratch_;

 public:
  A *const in, *const second, *const dense, *const filter;
};

template <class A>
static void convolve_tiles(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Map& x = args.in;
  const Map& y = args.out;
  DepthwiseTiles<A> tiles(args, y);
  for_tiles<A>(begin, end, x.c, [&](int64_t, int64_t n, int64_t c, int64_t count) {
    tiles.read_filter(c, count);
    tiles.read_input(n, c, count);
    A* out = tiles.second;
    for (int64_t i = 0; i < y.h; ++i) {
      const Taps down(args, i, x.h);
      for (int64_t j = 0; j < y.w; ++j, out += L) {
        const Taps across(args, j, x.w);
        Vec<A> sum{};
        for (int64_t u = down.begin; u < down.end; ++u) {
          const A* in = tiles.in + ((down.input + u) * x.w + across.input) * L;
          const A* w = tiles.filter + u * args.kernel * L;
          for (int64_t v = across.begin; v < across.end; ++v) {
            sum += load(in + v * L) * load(w + v * L);
          }
        }
        store(out, sum);
      }
    }
    write_tile(y, n, c, count, tiles.dense, tiles.second);
  });
}

// Every pixel of dy to the inputs that it came from.
template <class A>
static void grad_input_tiles(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Map& dy = args.in;
  const Map& dv = args.out;
  DepthwiseTiles<A> tiles(args, dv);
  for_tiles<A>(begin, end, dv.c, [&](int64_t, int64_t n, int64_t c, int64_t count) {
    tiles.read_filter(c, count);
    tiles.read_input(n, c, count);
    clear(tiles.second, dv.h * dv.w * L);
    const A* in = tiles.in;
    for (int64_t i = 0; i < dy.h; ++i) {
      const Taps down(args, i, dv.h);
      for (int64_t j = 0; j < dy.w; ++j, in += L) {
        const Taps across(args, j, dv.w);
        const Vec<A> g = load(in);
        for (int64_t u = down.begin; u < down.end; ++u) {
          A* out = tiles.second + ((down.input + u) * dv.w + across.input) * L;
          const A* w = tiles.filter + u * args.kernel * L;
          for (int64_t v = across.begin; v < across.end; ++v) {
            store(out + v * L, load(out + v * L) + g * load(w + v * L));
          }
        }
      }
    }
    write_tile(dv, n, c, count, tiles.dense, tiles.second);
  });
}

template <class A>
static void correlate_tiles(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Map& x = args.in;
  const Map& dy = args.dy;
  const int64_t taps = args.kernel * args.kernel;
  DepthwiseTiles<A> tiles(args, dy);
  for_tiles<A>(begin, end, x.c, [&](int64_t unit, int64_t group, int64_t c, int64_t count) {
    const int64_t first = group * kSamplesPerPartial;
    clear(tiles.filter, taps * L);
    for (int64_t n = first; n < smaller(first + kSamplesPerPartial, x.n); ++n) {
      tiles.read_input(n, c, count);
      read_tile(dy, n, c, count, tiles.dense, tiles.second);
      const A* g_at = tiles.second;
      for (int64_t i = 0; i < dy.h; ++i) {
        const Taps down(args, i, x.h);
        for (int64_t j = 0; j < dy.w; ++j, g_at += L) {
          const Taps across(args, j, x.w);
          const Vec<A> g = load(g_at);
          for (int64_t u = down.begin; u < down.end; ++u) {
            const A* in = tiles.in + ((down.input + u) * x.w + across.input) * L;
            A* w = tiles.filter + u * args.kernel * L;
            for (int64_t v = across.begin; v < across.end; ++v) {
              store(w + v * L, load(w + v * L) + g * load(in + v * L));
            }
          }
        }
      }
    }
    tiles.write_filter(static_cast<A*>(args.partial) + unit * taps, count);
  });
}

// --- choice -----------------------------------------------------------------------------------

template <class A>
static void convolve(const DepthwiseArgs& args, bool flip, int64_t begin, int64_t end) {
  const int64_t k = args.kernel, s = args.stride;
  if (in_tiles<A>(args.out, args.in)) return convolve_tiles<A>(args, begin, end);
  if (s == 1 && k == 3) return convolve_planes<A, 3>(args, flip, begin, end);
  if (s == 1 && k == 5) return convolve_planes<A, 5>(args, flip, begin, end);
  if (s == 2 && k == 3) return convolve_strided<A, 3, 2>(args, begin, end);
  if (s == 2 && k == 5) return convolve_strided<A, 5, 2>(args, begin, end);
  if (s == 4 && k == 7) return convolve_strided<A, 7, 4>(args, begin, end);
  if (s == 8 && k == 15) return convolve_strided<A, 15, 8>(args, begin, end);
  convolve_phases<A>(args, flip, begin, end);
}

static void depthwise(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  args.wide ? convolve<double>(args, false, begin, end) : convolve<float>(args, false, begin, end);
}

template <class A>
static void grad_input(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  const int64_t k = args.kernel, s = args.stride;
  if (in_tiles<A>(args.in, args.out)) return grad_input_tiles<A>(args, begin, end);
  if (s == 1) return convolve<A>(args, true, begin, end);
  if (s == 2 && k == 3) return grad_input_strided<A, 3, 2>(args, begin, end);
  if (s == 2 && k == 5) return grad_input_strided<A, 5, 2>(args, begin, end);
  if (s == 4 && k == 7) return grad_input_strided<A, 7, 4>(args, begin, end);
  if constexpr (kLanes<A> % 8 == 0) {
    if (s == 8 && k == 15) return grad_input_strided<A, 15, 8>(args, begin, end);
  }
  grad_input_phases<A>(args, begin, end);
}

static void depthwise_grad_input(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  args.wide ? grad_input<double>(args, begin, end) : grad_input<float>(args, begin, end);
}

template <class A>
static void grad_weight(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  const int64_t k = args.kernel, s = args.stride;
  if (in_tiles<A>(args.dy, args.in)) return correlate_tiles<A>(args, begin, end);
  if (s == 1 && k == 3) return correlate_planes<A, 3>(args, begin, end);
  if (s == 1 && k == 5) return correlate_planes<A, 5>(args, begin, end);
  if (s == 2 && k == 3) return correlate_strided<A, 3, 2>(args, begin, end);
  if (s == 2 && k == 5) return correlate_strided<A, 5, 2>(args, begin, end);
  if (s == 4 && k == 7) return correlate_strided<A, 7, 4>(args, begin, end);
  if (s == 8 && k == 15) return correlate_strided<A, 15, 8>(args, begin, end);
  correlate_phases<A>(args, begin, end);
}

static void depthwise_grad_weight(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  args.wide ? grad_weight<double>(args, begin, end) : grad_weight<float>(args, begin, end);
}
