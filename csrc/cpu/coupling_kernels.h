// y <- y +/- sum_k up_{f_k}(a_k p_k + b_k), upsampling alone, and the transpose of both.
// Inside namespace REVK_ISA.
#pragma once

#include "rows.h"

// Horizontal upsampling of kLanes outputs: out[l] = w0[l] x[base + i0[l]] + w1[l] x[base + i1[l]].
template <class A>
struct HorizontalPattern {
  Vec<A> w0, w1;
  IVec<A> i0, i1;
  int64_t base;
};

template <class A>
static HorizontalPattern<A> horizontal_pattern(int64_t j, int64_t f, int64_t w, Upsampling mode) {
  constexpr int64_t L = kLanes<A>;
  HorizontalPattern<A> pattern;
  int64_t base = upsample_source<A>(j, f, w, mode).i0;
  if (base > w - L) base = w < L ? 0 : w - L;
  pattern.base = base;
  for (int64_t l = 0; l < L; ++l) {
    const int64_t i = j + l < f * w ? j + l : f * w - 1;
    const Lerp<A> source = upsample_source<A>(i, f, w, mode);
    // One pixel twice as two halves: exact, and an infinity stays one.
    const bool single = source.i0 == source.i1;
    pattern.i0[l] = source.i0 - base;
    pattern.i1[l] = source.i1 - base;
    pattern.w0[l] = single ? A(0.5) : source.w0;
    pattern.w1[l] = single ? A(0.5) : source.w1;
  }
  return pattern;
}

// One contribution while a plane is computed.
template <class A>
struct Term {
  const Contribution* args;
  const HorizontalPattern<A>* patterns;  // of every vector of a row
  const Lerp<A>* sources;                // of every row of y
  A scale;
  const char* plane;
  A* slots[2];        // converted rows, by row number modulo 2
  int64_t cached[2];  // the row in each slot, or -1
  const A* row0;      // the rows to interpolate, or the one to add if f == 1
  const A* row1;
  A scale0, scale1;  // their weights times the scale
};

template <class A>
static inline const A* source_row(Term<A>& t, int64_t r) {
  const Map& p = t.args->p;
  const char* data = t.plane + r * p.sh * size_of(p.dtype);
  if (direct<A>(p)) return reinterpret_cast<const A*>(data);
  A* slot = t.slots[r & 1];
  if (t.cached[r & 1] != r) {
    read_row(p, data, slot, p.w);
    t.cached[r & 1] = r;
  }
  return slot;
}

template <class A>
static inline void set_rows(Term<A>& t, int64_t i) {
  const Lerp<A>& source = t.sources[i];
  const bool single = source.i0 == source.i1;
  t.row0 = source_row(t, source.i0);
  t.row1 = source_row(t, source.i1);
  t.scale0 = t.scale * (single ? A(0.5) : source.w0);
  t.scale1 = t.scale * (single ? A(0.5) : source.w1);
}

// How a stream takes the sum t. `Value` is an element of y, `Sum` the type of t; `take` updates up
// to `left` of y's elements, and the lanes that it returns are -1 where a result left the range, if
// `kCounts`. Signs are +1 or -1, steps powers of 2: products with them are exact, so that the
// inverse undoes the very same sum.

// y <- t.
template <class A>
struct Assigned {
  using Value = A;
  using Sum = A;
  static constexpr bool kReads = false, kCounts = false;

  explicit Assigned(const CoupleArgs&) {}
  IVec<A> take(A* y, Vec<A> t, int64_t left) const {
    store_left(y, t, left);
    return IVec<A>{};
  }
};

// y <- y + sign t.
template <class A>
struct Added {
  using Value = A;
  using Sum = A;
  static constexpr bool kReads = true, kCounts = false;
  A sign;

  explicit Added(const CoupleArgs& args) : sign(A(args.sign)) {}
  IVec<A> take(A* y, Vec<A> t, int64_t left) const {
    store_left(y, load_left(y, left) + sign * t, left);
    return IVec<A>{};
  }
};

// y <- y + sign q / steps, q = rint(t steps).
template <class A, bool Counts>
struct OnGrid {
  using Value = A;
  using Sum = A;
  static constexpr bool kReads = true, kCounts = Counts;
  A steps, step, limit;

  explicit OnGrid(const CoupleArgs& args)
      : steps(A(args.steps)), step(A(args.sign / args.steps)), limit(kPrecision<A> / steps) {}
  IVec<A> take(A* y, Vec<A> t, int64_t left) const {
    const Vec<A> z = load_left(y, left) + nearest(t * steps) * step;
    store_left(y, z, left);
    return magnitude_bits(z) >= magnitude_bits(splat(limit));  // infinity and NaN are above
  }
};

// y <- wrap16(y + sign q), q = rint(t steps); beyond int32 and for NaN q is -2^31, which is 0
// modulo 2^16 and far outside.
template <bool Counts>
struct Wrapped {
  using Value = int16_t;
  using Sum = float;
  static constexpr bool kReads = true, kCounts = Counts;
  float steps;

  explicit Wrapped(const CoupleArgs& args) : steps(float(args.sign * args.steps)) {}
  IVec<float> take(int16_t* y, Vec<float> t, int64_t left) const {
    const IVec<float> z = add_wrapped(load_left(y, left), nearest_int32(t * steps));
    store_left(y, z, left);
    return z << 16 >> 16 != z;
  }
};

// The first `ups` terms are upsampled (Ups of them if that is known at compile time), the others
// have f = 1. Down the columns first, in registers, then across the lanes. Returns how many results
// left the range.
template <class Stream, int Ups>
static int64_t couple_row(Stream stream, typename Stream::Value* y,
                          const Term<typename Stream::Sum>* terms, int64_t ups, int64_t count,
                          typename Stream::Sum shift, int64_t w) {
  using A = typename Stream::Sum;
  constexpr int L = kLanes<A>;
  IVec<A> outside{};
  if (Ups >= 0) ups = Ups;
  for (int64_t j = 0; j < w; j += L) {
    const int64_t left = w - j;
    Vec<A> total = splat(shift);
#pragma GCC unroll 4
    for (int64_t k = 0; k < ups; ++k) {
      const Term<A>& t = terms[k];
      const HorizontalPattern<A>& pattern = t.patterns[j / L];
      const int64_t width = t.args->p.w - pattern.base;
      const Vec<A> v = load_left(t.row0 + pattern.base, width) * t.scale0 +
                       load_left(t.row1 + pattern.base, width) * t.scale1;
      total += pattern.w0 * permute<A>(v, pattern.i0) + pattern.w1 * permute<A>(v, pattern.i1);
    }
    for (int64_t k = ups; k < count; ++k)
      total += load_left(terms[k].row0 + j, left) * terms[k].scale;
    const IVec<A> beyond = stream.take(y + j, total, left);
    if (Stream::kCounts) outside -= left < L ? beyond & first_ones<A>(left) : beyond;
  }
  int64_t sum = 0;
  for (int l = 0; Stream::kCounts && l < L; ++l) sum += outside[l];
  return sum;
}

template <class Stream>
static void couple_planes(const CoupleArgs& args, int64_t begin, int64_t end) {
  using A = typename Stream::Sum;
  using Value = typename Stream::Value;
  const Stream stream(args);
  const Map& y = args.y;
  const int64_t count = args.count;
  bool is_flat = flat(y);
  int64_t ups = 0;
  const int64_t room = (y.w > kSegment ? y.w : kSegment) + 2 * kLanes<A>;
  for (int64_t k = 0; k < count; ++k) {
    ups += args.terms[k].factor > 1;
    is_flat = is_flat && args.terms[k].factor == 1 && flat(args.terms[k].p);
  }
  const int64_t vectors = ceil_div(y.w, kLanes<A>);
  Scratch scratch(
      Scratch::bytes<Value>(room) + 2 * count * Scratch::bytes<A>(room) +
      Scratch::bytes<Term<A>>(count) +
      ups * (Scratch::bytes<Lerp<A>>(y.h) + Scratch::bytes<HorizontalPattern<A>>(vectors)));
  Value* y_scratch = scratch.take<Value>(room);
  Term<A>* terms = scratch.take<Term<A>>(count);
  int64_t next_up = 0, next_flat = ups;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t f = args.terms[k].factor;
    Term<A>& t = terms[f > 1 ? next_up++ : next_flat++];
    t.args = &args.terms[k];
    t.slots[0] = scratch.take<A>(room);
    t.slots[1] = scratch.take<A>(room);
    if (f == 1) continue;
    auto* patterns = scratch.take<HorizontalPattern<A>>(vectors);
    for (int64_t i = 0; i < vectors; ++i) {
      patterns[i] = horizontal_pattern<A>(i * kLanes<A>, f, t.args->p.w, args.mode);
    }
    t.patterns = patterns;
    Lerp<A>* sources = scratch.take<Lerp<A>>(y.h);
    for (int64_t i = 0; i < y.h; ++i) sources[i] = upsample_source<A>(i, f, t.args->p.h, args.mode);
    t.sources = sources;
  }
  const auto row_kernel = ups == 0   ? couple_row<Stream, 0>
                          : ups == 1 ? couple_row<Stream, 1>
                          : ups == 2 ? couple_row<Stream, 2>
                          : ups == 3 ? couple_row<Stream, 3>
                                     : couple_row<Stream, -1>;

  int64_t outside = 0;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / y.c, c = plane % y.c;
    A shift = 0;
    for (int64_t k = 0; k < count; ++k) {
      Term<A>& t = terms[k];
      t.plane = element(t.args->p, n, c);
      t.scale = coefficient(t.args->scale, n, c, A(1));
      t.cached[0] = t.cached[1] = -1;
      shift += coefficient(t.args->shift, n, c, A(0));
    }
    const auto couple_segment = [&](int64_t row, int64_t column, int64_t length) {
      char* data = element(y, n, c, row, column);
      Value* out = row_out(y, data, y_scratch);
      if (Stream::kReads && out == y_scratch) read_row(y, data, out, length);
      for (int64_t k = 0; k < ups; ++k) set_rows(terms[k], row);
      for (int64_t k = ups; k < count; ++k) {
        Term<A>& t = terms[k];
        const Map& p = t.args->p;
        t.row0 = row_as(p, element(p, n, c, row, column), t.slots[0], length);
      }
      outside += row_kernel(stream, out, terms, ups, count, shift, length);
      finish_row(y, out, data, length);
    };
    if (ups > 0) {
      for (int64_t row = 0; row < y.h; ++row) couple_segment(row, 0, y.w);
    } else {
      for_segments(is_flat, y.h, y.w, couple_segment);
    }
  }
  if (Stream::kCounts) __atomic_fetch_add(args.overflow, outside, __ATOMIC_RELAXED);
}

template <class A>
static void couple_float(const CoupleArgs& args, int64_t begin, int64_t end) {
  args.assign       ? couple_planes<Assigned<A>>(args, begin, end)
  : args.steps == 0 ? couple_planes<Added<A>>(args, begin, end)
  : args.overflow   ? couple_planes<OnGrid<A, true>>(args, begin, end)
                    : couple_planes<OnGrid<A, false>>(args, begin, end);
}

static void couple(const CoupleArgs& args, int64_t begin, int64_t end) {
  if (args.y.dtype == DType::int16) {
    args.overflow ? couple_planes<Wrapped<true>>(args, begin, end)
                  : couple_planes<Wrapped<false>>(args, begin, end);
  } else {
    args.wide ? couple_float<double>(args, begin, end) : couple_float<float>(args, begin, end);
  }
}

// --- adjoint ----------------------------------------------------------------------------------

// Sums over a plane of v and v (p - center), kept per lane until the end.
template <class A>
struct CenteredSums {
  Vec<A> sum, product;

  void add(Vec<A> v, Vec<A> p, A center) {
    sum += v;
    product += v * (p - center);
  }
  // A sum of its own for every row or segment: many short sums round less than one long one.
  void add(const CenteredSums& part) {
    sum += part.sum;
    product += part.product;
  }
  void add_row(const A* v, const A* p, A center, int64_t n) {
    CenteredSums part{};
    for (int64_t i = 0; i < n; i += kLanes<A>)
      part.add(load_left(v + i, n - i), load_left(p + i, n - i), center);
    add(part);
  }
};

// One pass down the columns: out[x] = sum_i weight[i] row_i[x].
template <class A>
static void gather_rows(const A* first_row, int64_t pitch, const A* weight, int64_t count, A* out,
                        int64_t w) {
  constexpr int L = kLanes<A>;
  int64_t x = 0;
  for (; x + 2 * L <= w; x += 2 * L) {
    Vec<A> s0{}, s1{};
    for (int64_t i = 0; i < count; ++i) {
      s0 += load(first_row + i * pitch + x) * weight[i];
      s1 += load(first_row + i * pitch + x + L) * weight[i];
    }
    store(out + x, s0);
    store(out + x + L, s1);
  }
  for (; x < w; x += L) {
    Vec<A> s{};
    for (int64_t i = 0; i < count; ++i) {
      s += load_left(first_row + i * pitch + x, w - x) * weight[i];
    }
    store(out + x, s);
  }
}

// Along rows: du[q] = sum_t w[t] v[f q + t - reach], t < 2 f.
// Weights clamped at the ends give the outermost pixels what their missing neighbours would get.
template <class A, int F>
static void gather_columns(const A* v, int64_t pitch, const Gather& term, Upsampling mode,
                           int64_t n, int64_t c, int64_t h, int64_t w, A* du_scratch, A* p_scratch,
                           CenteredSums<A>* total) {
  constexpr int L = kLanes<A>;
  const A center = coefficient(term.center, n, c, A(0));
  const bool bilinear = mode == Upsampling::bilinear;
  const int64_t reach = bilinear ? F / 2 : 0, width = F * w;
  A weight[2 * F], edge[F];
  for (int t = 0; t < 2 * F; ++t) {
    weight[t] = bilinear ? A(t < F ? 2 * t + 1 : 4 * F - 2 * t - 1) / A(2 * F) : A(t < F);
  }
  for (int r = 0; r < F / 2; ++r) edge[r] = A(1) - weight[F / 2 + r];
  for (int64_t j = 0; j < h; ++j, v += pitch) {
    char* data = element(term.du, n, c, j);
    A* du = row_out(term.du, data, du_scratch);
    const A* p = total ? row_as(term.p, element(term.p, n, c, j), p_scratch, w) : nullptr;
    CenteredSums<A> part{};
    for (int64_t q = 0; q < w; q += L) {
      Vec<A> sum{};
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
        if (side == 1 && !bilinear) break;
        const int64_t x = F * (q + side) - reach;
        Vec<A> phase[F];
#pragma GCC unroll 8
        for (int i = 0; i < F; ++i) {
          phase[i] = load(v + x + i * L, lanes_between<A>(-(x + i * L), width - (x + i * L)));
        }
        split<A, F>(phase);
#pragma GCC unroll 8
        for (int r = 0; r < F; ++r) sum += phase[r] * weight[side * F + r];
      }
      if (bilinear && q == 0) {
        A missing = 0;
        for (int r = 0; r < F / 2; ++r) missing += edge[r] * v[r];
        sum += lane_only<A>(missing, 0);
      }
      if (bilinear && w - q <= L) {
        A missing = 0;
        for (int r = 0; r < F / 2; ++r) missing += edge[r] * v[width - 1 - r];
        sum += lane_only<A>(missing, w - q - 1);
      }
      const int64_t left = w - q;
      store_left(du + q, sum, left);
      if (total) part.add(left < L ? first<A>(sum, left) : sum, load_left(p + q, left), center);
    }
    if (total) total->add(part);
    finish_row(term.du, du, data, w);
  }
}

template <class A>
static void couple_adjoint_planes(const CoupleAdjointArgs& args, int64_t begin, int64_t end) {
  const Map& dy = args.dy;
  const int64_t room = (dy.w > kSegment ? dy.w : kSegment);
  const int64_t pitch = dy.w + kLanes<A>;
  const int64_t copied = direct<A>(dy) ? 0 : dy.h * dy.w;
  Scratch scratch(Scratch::bytes<A>(copied) + Scratch::bytes<A>(dy.h / 2 * pitch) +
                  2 * Scratch::bytes<A>(room) + Scratch::bytes<A*>(args.count) +
                  args.count * Scratch::bytes<A>(2 * dy.h));
  A* dense = scratch.take<A>(copied);
  A* gathered = scratch.take<A>(dy.h / 2 * pitch);
  A* du_scratch = scratch.take<A>(room);
  A* p_scratch = scratch.take<A>(room);
  A** weights = scratch.take<A*>(args.count);  // [h, 2 f]: of the rows that each row of du gathers
  for (int64_t k = 0; k < args.count; ++k) {
    const int64_t f = args.terms[k].factor, h = dy.h / f;
    weights[k] = scratch.take<A>(2 * dy.h);
    for (int64_t j = 0; j < h; ++j) {
      const Window window = adjoint_window(j, f, h, args.mode);
      for (int64_t i = window.begin; i < window.end; ++i) {
        weights[k][j * 2 * f + i - window.begin] = adjoint_weight<A>(i, j, f, h, args.mode);
      }
    }
  }

  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / dy.c, c = plane % dy.c;
    const Plane<A> rows = plane_as(dy, n, c, dense);
    for (int64_t k = 0; k < args.count; ++k) {
      const Gather& term = args.terms[k];
      const int64_t f = term.factor, h = dy.h / f, w = dy.w / f;
      CenteredSums<A> total{};
      CenteredSums<A>* sums = term.sums ? &total : nullptr;
      if (f == 1 && sums) {
        const bool is_flat = (rows.pitch == dy.w || dy.h <= 1) && flat(term.p);
        const A center = coefficient(term.center, n, c, A(0));
        for_segments(is_flat, h, w, [&](int64_t row, int64_t column, int64_t length) {
          const A* p = row_as(term.p, element(term.p, n, c, row, column), p_scratch, length);
          total.add_row(rows.data + row * rows.pitch + column, p, center, length);
        });
      }
      for (int64_t j = 0; f > 1 && j < h; ++j) {
        const Window window = adjoint_window(j, f, h, args.mode);
        gather_rows(rows.data + window.begin * rows.pitch, rows.pitch, weights[k] + j * 2 * f,
                    window.end - window.begin, gathered + j * pitch, dy.w);
      }
      if (f == 2) {
        gather_columns<A, 2>(gathered, pitch, term, args.mode, n, c, h, w, du_scratch, p_scratch,
                             sums);
      } else if (f == 4) {
        gather_columns<A, 4>(gathered, pitch, term, args.mode, n, c, h, w, du_scratch, p_scratch,
                             sums);
      } else if (f == 8) {
        gather_columns<A, 8>(gathered, pitch, term, args.mode, n, c, h, w, du_scratch, p_scratch,
                             sums);
      }
      if (sums) {
        A* out = static_cast<A*>(term.sums);
        out[plane] = sum_lanes<A>(total.sum);
        out[term.sums_stride + plane] = sum_lanes<A>(total.product);
      }
    }
  }
}

static void couple_adjoint(const CoupleAdjointArgs& args, int64_t begin, int64_t end) {
  args.wide ? couple_adjoint_planes<double>(args, begin, end)
            : couple_adjoint_planes<float>(args, begin, end);
}
