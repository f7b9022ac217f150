// The 1x1 convolution y = W z and its weight gradient, z = gate hardswish(scale x + shift) or
// x itself. Inside namespace REVK_ISA.
//
// Samples are side by side: column j is pixel j % (H W) of sample j / (H W). A column is summed in
// the same order wherever it lies, so that a sample's results do not depend on its batch.
#pragma once

#include "rows.h"

// Consecutive columns, from a pixel of sample n on.
struct Columns {
  int64_t count, area, n, pixel;

  Columns(const Map& m, int64_t first, int64_t size)
      : count(size), area(m.h * m.w), n(first / area), pixel(first % area) {}

  // body(n, pixel, column, length): cut where a sample ends.
  template <class Body>
  void for_samples(const Body& body) const {
    int64_t sample = n, from = pixel;
    for (int64_t column = 0; column < count; ++sample, from = 0) {
      const int64_t length = smaller(area - from, count - column);
      body(sample, from, column, length);
      column += length;
    }
  }

  // body(data, column, length): cut where the elements of channel c are not evenly strided.
  template <class Body>
  void for_runs(const Map& m, int64_t c, const Body& body) const {
    const bool is_flat = flat(m);
    for_samples([&](int64_t sample, int64_t from, int64_t column, int64_t length) {
      if (is_flat) return body(element(m, sample, c, 0, from), column, length);
      for (int64_t at = 0, run; at < length; at += run) {
        const int64_t h = (from + at) / m.w, w = (from + at) % m.w;
        run = smaller(m.w - w, length - at);
        body(element(m, sample, c, h, w), column + at, run);
      }
    });
  }

  // Whether they are unit-stride rows of A in memory.
  template <class A>
  bool in_place(const Map& m) const {
    return direct<A>(m) && flat(m) && pixel + count <= area;
  }

  template <class A>
  A* row(const Map& m, int64_t c) const {
    return reinterpret_cast<A*>(element(m, n, c, 0, pixel));
  }

  template <class A>
  void read(const Map& m, int64_t c, A* out) const {
    if (direct<A>(m) && flat(m)) {
      return for_samples([&](int64_t sample, int64_t from, int64_t column, int64_t length) {
        copy(reinterpret_cast<const A*>(element(m, sample, c, 0, from)), out + column, length);
      });
    }
    for_runs(m, c, [&](const char* data, int64_t column, int64_t length) {
      read_row(m, data, out + column, length);
    });
  }

  template <class A>
  void write(const Map& m, int64_t c, const A* in) const {
    if (direct<A>(m) && flat(m)) {
      return for_samples([&](int64_t sample, int64_t from, int64_t column, int64_t length) {
        copy(in + column, reinterpret_cast<A*>(element(m, sample, c, 0, from)), length);
      });
    }
    for_runs(m, c, [&](char* data, int64_t column, int64_t length) {
      write_row(m, in + column, data, length);
    });
  }

 private:
  template <class A>
  static void copy(const A* in, A* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<A>) {
      store_left(out + i, load_left(in + i, n - i), n - i);
    }
  }
};

// z from x, with BatchNorm's coefficients as arrays of A.
template <class A>
class Prologue {
 public:
  explicit Prologue(const PointwiseArgs& args)
      : args_(args), scratch_(2 * Scratch::bytes<A>(args.x.c)) {
    scale_ = scratch_.take<A>(args.x.c);
    shift_ = scratch_.take<A>(args.x.c);
    for (int64_t c = 0; c < args.x.c; ++c) {
      scale_[c] = coefficient(args.scale, 0, c, A(1));
      shift_[c] = coefficient(args.shift, 0, c, A(0));
    }
  }

  // `channels` rows from channel `first` on, `pitch` apart; zeros follow up to a whole vector,
  // since what memory held before may be denormal, which is slow to multiply.
  void form(const Columns& columns, int64_t first, int64_t channels, A* z, int64_t pitch) const {
    const bool in_place = columns.in_place<A>(args_.x);
    for (int64_t c = first; c < first + channels; ++c, z += pitch) {
      const int64_t whole = columns.count / kLanes<A> * kLanes<A>;
      if (whole < columns.count) store(z + whole, Vec<A>{});
      const A* x = in_place ? columns.row<A>(args_.x, c) : z;
      if (!in_place) columns.read(args_.x, c, z);
      if (args_.scale.data != nullptr) {
        columns.for_samples([&](int64_t n, int64_t, int64_t column, int64_t length) {
          const A gate = coefficient(args_.gate, n, c, A(1));
          map_row(x + column, z + column, length,
                  [&](Vec<A> v) { return hardswish_v<A>(v * scale_[c] + shift_[c]) * gate; });
        });
      } else if (in_place) {
        map_row(x, z, columns.count, [](Vec<A> v) { return v; });
      }
    }
  }

 private:
  template <class F>
  static void map_row(const A* x, A* z, int64_t length, const F& f) {
    constexpr int L = kLanes<A>;
    int64_t i = 0;
    for (; i + L <= length; i += L) store(z + i, f(load(x + i)));
    if (i < length) store_left(z + i, f(load_left(x + i, length - i)), length - i);
  }

  const PointwiseArgs& args_;
  Scratch scratch_;
  A *scale_, *shift_;
};

// --- y = W z, or y + W z ------------------------------------------------------------------------

// A tile's sums and operands fit in the registers.
constexpr int kTileRows = REVK_BYTES == 64 ? 8 : 4;
constexpr int kTileVectors = 3;

// What becomes of the sums of a row of y: y <- sum, or y <- scale sum + shift; plus y if `kAdd`.
template <class A, bool kAffine = false, bool kAdd = false>
struct Finish {
  A scale[kTileRows] = {}, shift[kTileRows] = {};

  Finish() = default;
  // Of rows o to o + count.
  Finish(const PointwiseArgs& args, int64_t o, int64_t count) {
    for (int64_t r = 0; kAffine && r < count; ++r) {
      scale[r] = coefficient(args.out_scale, 0, o + r, A(1));
      shift[r] = coefficient(args.out_shift, 0, o + r, A(0));
    }
  }
  Vec<A> operator()(int r, Vec<A> sum, const A* y, int64_t left) const {
    if constexpr (kAffine) sum = sum * scale[r] + shift[r];
    if constexpr (kAdd) sum = load_left(y, left) + sum;
    return sum;
  }
};

// The weights of the tile to come, fetched while one of few columns is computed: there every weight
// comes from memory for little work.
template <class A>
struct Ahead {
  const A* weight = nullptr;
  int64_t step = 0;
};

// out[r][l] = sum_k weight[r][k step] panel[k, l] for V vectors of columns, of which `columns` are
// stored.
template <class A, int V, class F>
static void pointwise_vectors(const A* const* weight, int64_t step, const A* panel, int64_t pitch,
                              int64_t depth, A* const* out, int64_t columns, const F& finish,
                              Ahead<A> ahead) {
  constexpr int L = kLanes<A>, R = kTileRows;
  const A* w[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    w[r] = weight[r];
    for (int v = 0; v < V; ++v) __builtin_prefetch(out[r] + v * L, 1);
  }
  Vec<A> sums[R][V] = {};
  for (int64_t k = 0; k < depth; ++k, panel += pitch) {
    if (V < kTileVectors && ahead.weight) __builtin_prefetch(ahead.weight + k * ahead.step);
    Vec<A> x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(panel + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<A> a = splat(w[r][k * step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += a * x[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * L;
      store_left(out[r] + v * L, finish(r, sums[r][v], out[r] + v * L, left), left);
    }
  }
}

template <class A, class F>
static void pointwise_tile(const A* const* weight, int64_t step, const A* panel, int64_t pitch,
                           int64_t depth, A* const* out, int64_t columns, const F& finish,
                           Ahead<A> ahead = {}) {
  static_assert(kTileVectors == 3);
  constexpr int L = kLanes<A>;
  if (columns > 2 * L) {
    pointwise_vectors<A, 3>(weight, step, panel, pitch, depth, out, columns, finish, ahead);
  } else if (columns > L) {
    pointwise_vectors<A, 2>(weight, step, panel, pitch, depth, out, columns, finish, ahead);
  } else {
    pointwise_vectors<A, 1>(weight, step, panel, pitch, depth, out, columns, finish, ahead);
  }
}

// Units are blocks of rows of the weight in panels of columns; z is formed once in a panel.
template <class A, bool kAffine, bool kAdd>
static void pointwise_panels(const PointwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int R = kTileRows, C = kTileVectors * kLanes<A>;
  static_assert(kPanelColumns % C == 0);
  const Map& x = args.x;
  const Map& y = args.y;
  const A* weight = static_cast<const A*>(args.weight);
  const int64_t pitch = args.panel;
  Scratch scratch(Scratch::bytes<A>(x.c * pitch) + R * Scratch::bytes<A>(pitch));
  A* panel = scratch.take<A>(x.c * pitch);
  A* copies[R];
  for (A*& row : copies) row = scratch.take<A>(pitch);
  const Prologue<A> prologue(args);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % args.blocks, first = unit / args.blocks * pitch;
    const Columns columns(x, first, smaller(pitch, x.n * x.h * x.w - first));
    if (block == 0 || unit == begin) prologue.form(columns, 0, x.c, panel, pitch);
    const bool in_place = columns.in_place<A>(y);
    const int64_t block_rows = ceil_div(ceil_div(y.c, args.blocks), R) * R;
    const int64_t last = smaller((block + 1) * block_rows, y.c);
    for (int64_t o = block * block_rows; o < last; o += R) {
      const int64_t rows = smaller(R, last - o);
      const A* w[R];
      A* out[R];
      for (int r = 0; r < R; ++r) {
        w[r] = weight + (r < rows ? o + r : o) * args.weight_row;
        out[r] = in_place && r < rows ? columns.row<A>(y, o + r) : copies[r];
      }
      for (int64_t r = 0; kAdd && !in_place && r < rows; ++r) columns.read(y, o + r, copies[r]);
      const Finish<A, kAffine, kAdd> finish(args, o, rows);
      const bool in_rows = args.weight_column == 1;  // dense: a tile's weights follow the last's
      const Ahead<A> ahead{weight + (o + R) * args.weight_row, in_rows ? R : args.weight_column};
      for (int64_t j = 0; j < columns.count; j += C) {
        pointwise_tile<A>(w, args.weight_column, panel + j, pitch, x.c, out, columns.count - j,
                          finish, ahead);
        for (A*& row : out) row += C;
      }
      for (int64_t r = 0; !in_place && r < rows; ++r) columns.write(y, o + r, copies[r]);
    }
  }
}

template <class A>
static void pointwise_as(const PointwiseArgs& args, int64_t begin, int64_t end) {
  const bool affine = args.out_scale.data != nullptr;
  affine ? (args.add ? pointwise_panels<A, true, true>(args, begin, end)
                     : pointwise_panels<A, true, false>(args, begin, end))
         : (args.add ? pointwise_panels<A, false, true>(args, begin, end)
                     : pointwise_panels<A, false, false>(args, begin, end));
}

static void pointwise(const PointwiseArgs& args, int64_t begin, int64_t end) {
  args.wide ? pointwise_as<double>(args, begin, end) : pointwise_as<float>(args, begin, end);
}

// --- dW += sum_j dy_j z_j^T ---------------------------------------------------------------------

constexpr int kDyRows = REVK_BYTES == 64 ? 4 : 2;  // rows of dy in a tile, with kDotRows of z

// dw[d, r] += sum_l dy[d][l] z[r, l]
template <class A>
static void pointwise_dots(const A* const* dy, const A* z, int64_t length, A* dw, int64_t pitch) {
  constexpr int L = kLanes<A>, D = kDyRows, R = kDotRows, G = D * R < L ? D * R : L;
  Vec<A> sums[D * R] = {};
  const auto add = [&](int64_t i, int64_t left) {
    Vec<A> b[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) b[r] = load_left(z + r * kSegment + i, left);
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) {
      const Vec<A> a = load_left(dy[d] + i, left);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[d * R + r] += a * b[r];
    }
  };
  int64_t i = 0;
  for (; i + L <= length; i += L) add(i, L);
  if (i < length) add(i, length - i);
  A dots[D * R];
#pragma GCC unroll 8
  for (int g = 0; g < D * R; g += G) {
    A lanes[L];
    store(lanes, sum_lanes_of<A, G>(sums + g));
    for (int t = 0; t < G; ++t) dots[g + t] = lanes[t * (L / G)];
  }
#pragma GCC unroll 4
  for (int d = 0; d < D; ++d) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) dw[d * pitch + r] += dots[d * R + r];
  }
}

// Units are kDotRows rows of z, columns of dW. Up to kZRows of them are formed at a time and meet
// every row of dy; columns are summed in segments, each of one sample or of whole samples.
template <class A>
static void pointwise_grad_weight_dots(const PointwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kZRows = 32;
  const Map& x = args.x;
  const Map& dy = args.y;
  const int64_t area = x.h * x.w, total = x.n * area, parts = ceil_div(area, kSegment);
  const int64_t segment = parts > 1 ? ceil_div(area, parts) : kSegment / area * area;
  const int64_t last = smaller(end * kDotRows, x.c);
  Scratch scratch(Scratch::bytes<A>(kZRows * kSegment) + kDyRows * Scratch::bytes<A>(kSegment));
  A* z = scratch.take<A>(kZRows * kSegment);
  A* copies[kDyRows];
  for (A*& row : copies) row = scratch.take<A>(kSegment);
  A* dw = static_cast<A*>(args.grad_weight);
  const Prologue<A> prologue(args);
  for (int64_t c = begin * kDotRows; c < last; c += kZRows) {
    const int64_t z_rows = smaller(kZRows, last - c);
    for (int64_t first = 0, count; first < total; first += count) {
      count = smaller(segment, parts > 1 ? area - first % area : total - first);
      const Columns columns(x, first, count);
      prologue.form(columns, c, z_rows, z, kSegment);
      for (int64_t t = z_rows; t % kDotRows != 0; ++t) clear(z + t * kSegment, count);
      const bool in_place = columns.in_place<A>(dy);
      for (int64_t o = 0; o < dy.c; o += kDyRows) {
        const int64_t dy_rows = smaller(kDyRows, dy.c - o);
        const A* in[kDyRows];
        for (int d = 0; d < kDyRows; ++d) {
          if (!in_place && d < dy_rows) columns.read(dy, o + d, copies[d]);
          const int d_or_0 = d < dy_rows ? d : 0;
          in[d] = in_place ? columns.row<A>(dy, o + d_or_0) : copies[d_or_0];
        }
        for (int64_t t = 0; t < z_rows; t += kDotRows) {
          A* out = dw + o * x.c + c + t;
          if (dy_rows == kDyRows && t + kDotRows <= z_rows) {
            pointwise_dots<A>(in, z + t * kSegment, count, out, x.c);
            continue;
          }
          A edge[kDyRows * kDotRows] = {};
          pointwise_dots<A>(in, z + t * kSegment, count, edge, kDotRows);
          for (int64_t d = 0; d < dy_rows; ++d) {
            for (int64_t r = 0; r < kDotRows && t + r < z_rows; ++r) {
              out[d * x.c + r] += edge[d * kDotRows + r];
            }
          }
        }
      }
    }
  }
}

// The same for many channels: the product of dy with panels of z^T. Units are blocks of rows of dy
// in panels of channels; z^T is formed kPanelDepth columns at a time, once for all blocks at hand.
template <class A>
static void pointwise_grad_weight_panels(const PointwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanelChannels, kPanelDepth = 256;
  constexpr int R = kTileRows, C = kTileVectors * kLanes<A>, L = kLanes<A>;
  const Map& x = args.x;
  const Map& dy = args.y;
  const int64_t total = x.n * x.h * x.w;
  Scratch scratch(2 * Scratch::bytes<A>(P * kPanelDepth) + R * Scratch::bytes<A>(kPanelDepth) +
                  R * Scratch::bytes<A>(C));
  A* z = scratch.take<A>(P * kPanelDepth);
  A* panel = scratch.take<A>(P * kPanelDepth);
  A *copies[R], *sums[R];
  for (A*& row : copies) row = scratch.take<A>(kPanelDepth);
  for (A*& row : sums) row = scratch.take<A>(C);
  const Prologue<A> prologue(args);
  for (int64_t unit = begin, stop; unit < end; unit = stop) {
    stop = smaller(end, (unit / args.blocks + 1) * args.blocks);
    const int64_t c = unit / args.blocks * args.panel, channels = smaller(args.panel, x.c - c);
    const int64_t begin_row = unit % args.blocks * kBlockRows;
    const int64_t end_row = smaller(begin_row + (stop - unit) * kBlockRows, dy.c);
    for (int64_t first = 0; first < total; first += kPanelDepth) {
      const Columns columns(x, first, smaller(kPanelDepth, total - first));
      prologue.form(columns, c, channels, z, kPanelDepth);
      for (int64_t r = channels; r % L != 0; ++r) clear(z + r * kPanelDepth, columns.count);
      for (int64_t k = 0; k < columns.count; k += L) {
        for (int64_t l = 0; l < channels; l += L) {
          Vec<A> tile[L];
#pragma GCC unroll 16
          for (int r = 0; r < L; ++r) tile[r] = load(z + (l + r) * kPanelDepth + k);
          transpose<A>(tile);
#pragma GCC unroll 16
          for (int r = 0; r < L; ++r) store(panel + (k + r) * P + l, tile[r]);
        }
      }
      const bool in_place = columns.in_place<A>(dy);
      for (int64_t o = begin_row; o < end_row; o += R) {
        const int64_t rows = smaller(R, end_row - o);
        const A* in[R];
        for (int r = 0; r < R; ++r) {
          if (!in_place && r < rows) columns.read(dy, o + r, copies[r]);
          const int64_t r_or_0 = r < rows ? r : 0;
          in[r] = in_place ? columns.row<A>(dy, o + r_or_0) : copies[r_or_0];
        }
        for (int64_t j = 0; j < channels; j += C) {
          const int64_t count = smaller(C, channels - j);
          A* dw = static_cast<A*>(args.grad_weight) + o * x.c + c + j;
          A* out[R];
          const bool add = args.add || first > 0;
          for (int r = 0; r < R; ++r) out[r] = !add && r < rows ? dw + r * x.c : sums[r];
          pointwise_tile<A>(in, 1, panel + j, P, columns.count, out, count, Finish<A>());
          for (int64_t r = 0; add && r < rows; ++r) {
            for (int64_t l = 0; l < count; ++l) dw[r * x.c + l] += sums[r][l];
          }
        }
      }
    }
  }
}

static void pointwise_grad_weight(const PointwiseArgs& args, int64_t begin, int64_t end) {
  if (args.wide) {
    args.blocks > 0 ? pointwise_grad_weight_panels<double>(args, begin, end)
                    : pointwise_grad_weight_dots<double>(args, begin, end);
  } else {
    args.blocks > 0 ? pointwise_grad_weight_panels<float>(args, begin, end)
                    : pointwise_grad_weight_dots<float>(args, begin, end);
  }
}
