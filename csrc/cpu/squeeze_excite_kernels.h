// The two layers of squeeze-excite and their gradients: small matrix products, row-major. Inside
// namespace REVK_ISA.
//
// Every element is summed in the same order whatever tile it is in, so that a sample's results do
// not depend on its batch.
#pragma once

#include "rows.h"

// --- in weight^T: dot products of rows ----------------------------------------------------------

template <class A>
REVK_INLINE Vec<A> hardsigmoid_v(Vec<A> u) {
  return vmin<A>(vmax<A>(u + A(3), Vec<A>{}), splat<A>(6)) / A(6);
}

// Outputs of one tile: kDotRows rows of the weight for S samples.
template <class A, int S>
static void layer_tile(const LayerArgs& args, int64_t n0, int64_t j0) {
  constexpr int L = kLanes<A>, J = kDotRows, P = S * J, Step = L / P;
  const A* in = static_cast<const A*>(args.in) + n0 * args.width;
  const A* weight[J];
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j) {  // rows beyond the last are the last again, and not stored
    const int64_t row = j0 + j < args.rows ? j0 + j : args.rows - 1;
    weight[j] = static_cast<const A*>(args.weight) + row * args.width;
  }
  Vec<A> sums[P] = {};
  const auto add = [&](int64_t k, int64_t left) {
    Vec<A> x[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) x[s] = load_left(in + s * args.width + k, left);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      const Vec<A> w = load_left(weight[j] + k, left);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sums[s * J + j] += x[s] * w;
    }
  };
  int64_t k = 0;
  for (; k + L <= args.width; k += L) add(k, L);
  if (k < args.width) add(k, args.width - k);

  A bias[L];
  for (int l = 0; l < L; ++l) {
    const int64_t j = j0 + l / Step % J;
    bias[l] = static_cast<const A*>(args.bias)[j < args.rows ? j : args.rows - 1];
  }
  const Vec<A> u = sum_lanes_of<A, P>(sums) + load(bias);
  A out[L], active[L];
  store(out, args.hardsigmoid ? hardsigmoid_v<A>(u) : u);
  store(active, hardswish_v<A>(u));
  const int64_t count = args.rows - j0 < J ? args.rows - j0 : J;
  for (int s = 0; s < S; ++s) {
    const int64_t first = (n0 + s) * args.rows + j0;
    for (int64_t j = 0; j < count; ++j) {
      static_cast<A*>(args.out)[first + j] = out[(s * J + j) * Step];
      if (args.active) static_cast<A*>(args.active)[first + j] = active[(s * J + j) * Step];
    }
  }
}

template <class A>
static void layer_rows(const LayerArgs& args, int64_t begin, int64_t end) {
  constexpr int S = kLanes<A> / kDotRows < 4 ? kLanes<A> / kDotRows : 4;
  for (int64_t block = begin; block < end; ++block) {
    int64_t n = 0;
    for (; n + S <= args.n; n += S) layer_tile<A, S>(args, n, block * kDotRows);
    if constexpr (S > 2) {
      for (; n + 2 <= args.n; n += 2) layer_tile<A, 2>(args, n, block * kDotRows);
    }
    for (; n < args.n; ++n) layer_tile<A, 1>(args, n, block * kDotRows);
  }
}

static void layer(const LayerArgs& args, int64_t begin, int64_t end) {
  args.wide ? layer_rows<double>(args, begin, end) : layer_rows<float>(args, begin, end);
}

// --- left right: sums of rows -------------------------------------------------------------------

// R rows and V vectors of outputs, terms k0 to k1; those before k0 are in `out` already.
template <class A, int R, int V>
static void product_tile(const ProductArgs& args, int64_t i0, int64_t j0, int64_t k0, int64_t k1) {
  constexpr int L = kLanes<A>;
  const A* left = static_cast<const A*>(args.left) + i0 * args.left_row;
  const A* right = static_cast<const A*>(args.right) + j0;
  Mask<A> masks[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) masks[v] = lanes_between<A>(0, args.columns - j0 - v * L);
  Vec<A> sums[R * V] = {};
  for (int64_t k = k0; k < k1; ++k) {
    Vec<A> b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(right + k * args.columns + v * L, masks[v]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> a = splat(left[r * args.left_row + k * args.left_column]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r * V + v] += a * b[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    const int64_t at = (i0 + r) * args.columns + j0;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* out = static_cast<A*>(args.out) + at + v * L;
      Vec<A> sum = sums[r * V + v];
      if (k0 > 0) sum += load(out, masks[v]);
      if (args.hidden && k1 == args.depth) {
        const A* hidden = static_cast<const A*>(args.hidden) + at + v * L;
        sum *= hardswish_slope_v<A>(load(hidden, masks[v]));
      }
      store(out, sum, masks[v]);
    }
  }
}

template <class A, int V>
static void product_columns(const ProductArgs& args, int64_t j0) {
  constexpr int R = 4;
  int64_t k0 = 0;
  do {
    const int64_t k1 = args.depth - k0 < kDepthBlock ? args.depth : k0 + kDepthBlock;
    int64_t i = 0;
    for (; i + R <= args.rows; i += R) product_tile<A, R, V>(args, i, j0, k0, k1);
    for (; i + 2 <= args.rows; i += 2) product_tile<A, 2, V>(args, i, j0, k0, k1);
    for (; i < args.rows; ++i) product_tile<A, 1, V>(args, i, j0, k0, k1);
    k0 = k1;
  } while (k0 < args.depth);
}

template <class A>
static void product_blocks(const ProductArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t j = block * kColumnBlock;
    const int64_t last = args.columns - j < kColumnBlock ? args.columns : j + kColumnBlock;
    for (int64_t column = j; column < last;) {
      const int64_t vectors = ceil_div(last - column, L);
      if (vectors > 2) {
        product_columns<A, 4>(args, column);
        column += 4 * L;
      } else if (vectors == 2) {
        product_columns<A, 2>(args, column);
        column += 2 * L;
      } else {
        product_columns<A, 1>(args, column);
        column += L;
      }
    }
  }
}

static void product(const ProductArgs& args, int64_t begin, int64_t end) {
  args.wide ? product_blocks<double>(args, begin, end) : product_blocks<float>(args, begin, end);
}

// --- element by element -------------------------------------------------------------------------

// hardsigmoid's slope is float32(1 / 6) inside (0, 1) in every dtype, as in PyTorch.
template <class A>
static void gate_slopes_as(const GateSlopeArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  for (int64_t i = begin * kGateSegment; i < end * kGateSegment; i += L) {
    if (i < args.gates) {
      const int64_t left = args.gates - i;
      const Vec<A> gate = load_left(static_cast<const A*>(args.gate) + i, left);
      const Vec<A> slope = load_left(static_cast<const A*>(args.dgate) + i, left) * A(1.f / 6.f);
      const IVec<A> inside = (gate > A(0)) & (gate < A(1));
      store_left(static_cast<A*>(args.dv) + i, (Vec<A>)((IVec<A>)slope & inside), left);
    }
    if (i < args.hiddens) {
      const int64_t left = args.hiddens - i;
      const Vec<A> hidden = load_left(static_cast<const A*>(args.hidden) + i, left);
      store_left(static_cast<A*>(args.active) + i, hardswish_v<A>(hidden), left);
    }
  }
}

static void gate_slopes(const GateSlopeArgs& args, int64_t begin, int64_t end) {
  args.wide ? gate_slopes_as<double>(args, begin, end) : gate_slopes_as<float>(args, begin, end);
}
