// Squeeze-excite: means over planes of an activated BatchNorm, u = scale x + shift, two layers, the
// gated map, and the layers' gradients.
//
//   pooled[n, c] = sum_hw h(u) / (H W)      z = gate h(u)
//   hidden = w1 pooled + b1                 gate = hardsigmoid(w2 hardswish(hidden) + b2)
//   dv = dgate hardsigmoid'                 dhidden = hardswish'(hidden) (dv w2)
//   dpooled = dhidden w1 / pixels           dw1 = dhidden^T pooled     dw2 = dv^T hardswish(hidden)
//
// Means, per value one read and 8 FLOPs, and the map, one read and one write, are bound by memory.
// A plane's sums are folded as a tree, its parts (beyond 16384 pixels) in order.
//
// The layers are small matrix products: a tile of 4 x 4 outputs belongs to `lanes` threads, which
// share the K terms: lane l takes the terms l, l + lanes, ..., and the lanes are folded as a tree.
// `lanes` depends on K alone, so a sample's gate does not depend on its batch; whether its
// gradients take one launch, in which a thread adds in order, does. In full precision, as float32
// weights are; bound by latency at these sizes, so products that do not wait for one another share
// a launch, and all of them where a gate is small: its layers with a block per sample, with the
// means and the map where the sample is small too, their gradients with a block per eight channels.
// No atomics.
#include "walk.cuh"

namespace revkernels::cuda {
namespace {

// --- squeeze ------------------------------------------------------------------------------------

// A group's part of a plane's mean.
template <class T, int V>
__device__ __forceinline__ void squeeze_plane(const PlaneLanes& walk, const PlanePart& place,
                                              const Map& x, const Norm& norm,
                                              accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  Sums<A, 1> sums = {};
  if (place.exists) {
    const A scale = entry<A>(norm.scale, place.channel, A(1));
    const A shift = entry<A>(norm.shift, place.channel, A(0));
    const T* plane = plane_of<T>(x, place);
    for_chunks<V>(walk, place, [&](unsigned chunk) {
      A in[V];
      walk.load<T>(x, plane, chunk, in);
      A sum = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) sum += activate(multiply_add(scale, in[i], shift), norm.act);
      sums.value[0] += sum;
    });
  }
  sums.value[0] /= A(walk.pixels);
  finish_sums(walk, place, sums, out, walk.planes);
}

template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bn_act_squeeze_kernel(const PlaneLanes walk, const Map x, const Norm norm,
                          accumulate_t<T>* out) {
  squeeze_plane<T, V>(walk, PlanePart(walk), x, norm, out);
}

// --- products -----------------------------------------------------------------------------------

constexpr int kTile = 4;

int lanes_of(int64_t terms) {
  int lanes = 4;
  while (lanes < 64 && lanes * 4 < terms) lanes *= 2;
  return lanes;
}

// What an operand's entry stands for, and what becomes of a result.
enum class Operand : int { plain, hardswish, gate_slope };
enum class Result : int { plain, hardsigmoid, hardswish_slope };

// Of the two layers.
struct GateLanes {
  int first, second;

  explicit GateLanes(const SqueezeExcite& se)
      : first(lanes_of(se.channels)), second(lanes_of(se.hidden)) {}
};

// out [M, N] = e((sum_k a[m, k] b[k, n] + bias[n]) factor), and a_sum [M] = sum_k a[m, k].
struct Product {
  const void* a;
  const void* gate;  // beside a, where it counts as a hardsigmoid'
  const void* b;
  const void* bias;    // [N] or null
  const void* hidden;  // [M, N], where e multiplies by hardswish'(hidden)
  void* out;
  void* a_sum;  // or null
  int64_t m, n, k;
  int64_t a_m, a_k, b_k, b_n;  // strides
  Operand a_kind, b_kind;
  Result kind;
  double factor;
  int lanes;
  unsigned blocks;

  Product(int64_t m, int64_t n, int64_t k, const void* a, int64_t a_m, int64_t a_k, const void* b,
          int64_t b_k, int64_t b_n, void* out)
      : a(a),
        gate(nullptr),
        b(b),
        bias(nullptr),
        hidden(nullptr),
        out(out),
        a_sum(nullptr),
        m(m),
        n(n),
        k(k),
        a_m(a_m),
        a_k(a_k),
        b_k(b_k),
        b_n(b_n),
        a_kind(Operand::plain),
        b_kind(Operand::plain),
        kind(Result::plain),
        factor(1),
        lanes(lanes_of(k)),
        blocks(0) {
    blocks = unsigned(ceil_div(ceil_div(m, kTile) * ceil_div(n, kTile), kMaxThreads / lanes));
  }
  Product() : Product(0, 0, 0, nullptr, 0, 0, nullptr, 0, 0, nullptr) {}
};

struct Products {
  Product product[3];
};

template <class A>
__global__ void __launch_bounds__(kMaxThreads) products_kernel(const Products all) {
  REVK_SHARED(shared);
  unsigned block = blockIdx.x;
  int which = 0;
  while (which < 2 && block >= all.product[which].blocks) block -= all.product[which++].blocks;
  const Product& p = all.product[which];

  const int lane = int(threadIdx.x) & (p.lanes - 1), group = int(threadIdx.x) / p.lanes;
  const int64_t tiles_n = ceil_div(p.n, kTile);
  const int64_t tile = int64_t(block) * (kMaxThreads / p.lanes) + group;
  const int64_t m0 = tile / tiles_n * kTile, n0 = (tile - tile / tiles_n * tiles_n) * kTile;
  constexpr int K = kTile * kTile + kTile;
  Sums<A, K> sums = {};
  if (m0 < p.m) {
#pragma unroll 2
    for (int64_t k = lane; k < p.k; k += p.lanes) {
      A a[kTile], b[kTile];
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const int64_t at = (m0 + i < p.m ? m0 + i : p.m - 1) * p.a_m + k * p.a_k;
        a[i] = static_cast<const A*>(p.a)[at];
        if (p.a_kind == Operand::hardswish) a[i] = hardswish(a[i]);
        if (p.a_kind == Operand::gate_slope) {
          a[i] *= hardsigmoid_slope(static_cast<const A*>(p.gate)[at]);
        }
      }
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const int64_t at = k * p.b_k + (n0 + j < p.n ? n0 + j : p.n - 1) * p.b_n;
        b[j] = static_cast<const A*>(p.b)[at];
        if (p.b_kind == Operand::hardswish) b[j] = hardswish(b[j]);
      }
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
          sums.value[i * kTile + j] = multiply_add(a[i], b[j], sums.value[i * kTile + j]);
        }
        sums.value[kTile * kTile + i] += a[i];
      }
    }
  }
  const auto add = [](const Sums<A, K>& a, const Sums<A, K>& b) { return a + b; };
  auto* folded = reinterpret_cast<Sums<A, K>*>(shared);
  fold_lanes(sums, p.lanes, folded, add);
  __syncthreads();
  if (m0 >= p.m) return;
  const A* total = folded[group * p.lanes].value;
  for (int o = lane; o < K; o += p.lanes) {
    const int i = o < kTile * kTile ? o / kTile : o - kTile * kTile, j = o % kTile;
    const int64_t row = m0 + i, column = n0 + j;
    if (row >= p.m) continue;
    if (o >= kTile * kTile) {
      if (p.a_sum != nullptr && n0 == 0) static_cast<A*>(p.a_sum)[row] = total[o];
      continue;
    }
    if (column >= p.n) continue;
    A value = total[o];
    if (p.bias != nullptr) value += static_cast<const A*>(p.bias)[column];
    if (p.kind == Result::hardsigmoid) value = hardsigmoid(value);
    if (p.kind == Result::hardswish_slope) {
      value *= hardswish_slope(static_cast<const A*>(p.hidden)[row * p.n + column]);
    }
    static_cast<A*>(p.out)[row * p.n + column] = value * A(p.factor);
  }
}

// out[i] = e(sum_k w[i, k] x[k] + bias[i]) of i < rows, by a block whose `lanes` threads share a
// row.
template <class A, class Load, class Store>
__device__ __forceinline__ void layer(const void* w, const void* bias, int64_t rows, int64_t width,
                                      int lanes, A* shared, const Load& load, const Store& store) {
  const int groups = kMaxThreads / lanes, group = int(threadIdx.x) / lanes;
  const int lane = int(threadIdx.x) & (lanes - 1);
  const auto add = [](A a, A b) { return a + b; };
  for (int64_t first = 0; first < rows; first += groups) {
    const int64_t row = first + group;
    A sum = 0;
    if (row < rows) {
#pragma unroll 2
      for (int64_t k = lane; k < width; k += lanes) {
        sum = multiply_add(load(k), static_cast<const A*>(w)[row * width + k], sum);
      }
    }
    sum = fold_lanes(sum, lanes, shared, add);
    if (row < rows && lane == 0) store(row, sum + static_cast<const A*>(bias)[row]);
    __syncthreads();  // before `shared` is used again, and for what was stored
  }
}

// Both layers of the block's sample; `shared` has room for kMaxThreads + R values.
template <class A>
__device__ __forceinline__ void gate_sample(const SqueezeExcite& se, const GateLanes& lanes,
                                            A* shared, const A* pooled, A* hidden, A* gate) {
  A* active = shared + kMaxThreads;
  layer<A>(
      se.w1, se.b1, se.hidden, se.channels, lanes.first, shared,
      [&](int64_t k) { return pooled[k]; },
      [&](int64_t row, A value) {
        hidden[row] = value;
        active[row] = hardswish(value);
      });
  layer<A>(
      se.w2, se.b2, se.channels, se.hidden, lanes.second, shared,
      [&](int64_t k) { return active[k]; },
      [&](int64_t row, A value) { gate[row] = hardsigmoid(value); });
}

template <class A>
__global__ void __launch_bounds__(kMaxThreads)
    gate_kernel(const SqueezeExcite se, const GateLanes lanes, const A* pooled, A* hidden,
                A* gate) {
  REVK_SHARED(shared);
  const int64_t sample = blockIdx.x;
  gate_sample(se, lanes, reinterpret_cast<A*>(shared), pooled + sample * se.channels,
              hidden + sample * se.hidden, gate + sample * se.channels);
}

// bn_act_squeeze, se_gate and bn_act of one sample, which one block goes through twice: what is
// added to what is the same.
template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    gate_act_kernel(const PlaneLanes walk, const Map x, const Map z, const Norm norm,
                    const SqueezeExcite se, const GateLanes lanes, accumulate_t<T>* pooled,
                    accumulate_t<T>* hidden, accumulate_t<T>* gate) {
  using A = accumulate_t<T>;
  REVK_SHARED(shared);
  const int64_t sample = blockIdx.x;
  const int groups = kMaxThreads / walk.lanes, group = int(threadIdx.x) / walk.lanes;
  for (int first = 0; first < walk.channels; first += groups) {
    squeeze_plane<T, V>(walk, PlanePart(walk, sample, first + group), x, norm, pooled);
    __syncthreads();  // before `shared` is used again, and for what the block wrote
  }
  gate_sample(se, lanes, reinterpret_cast<A*>(shared), pooled + sample * se.channels,
              hidden + sample * se.hidden, gate + sample * se.channels);
  for (int channel = group; channel < walk.channels; channel += groups) {
    const PlanePart place(walk, sample, channel);
    const A scale = entry<A>(norm.scale, channel, A(1)),
            shift = entry<A>(norm.shift, channel, A(0));
    const A factor = gate[place.plane];
    const T* plane = plane_of<T>(x, place);
    T* to = const_cast<T*>(plane_of<T>(z, place));
    for_chunks<V>(walk, place, [&](unsigned chunk) {
      A in[V];
      walk.load<T>(x, plane, chunk, in);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        in[i] = factor * activate(multiply_add(scale, in[i], shift), norm.act);
      }
      walk.store<T>(z, to, chunk, in);
    });
  }
}

// All gradients by blocks of kGradChannels channels each; every block computes dhidden of all
// samples for itself.
constexpr int kGradChannels = 8;

template <class A>
__global__ void __launch_bounds__(kMaxThreads)
    gate_grad_kernel(const SqueezeExcite se, const A* dgate, const A* gate, const A* hidden,
                     const A* pooled, A factor, const SqueezeExciteGrad grad) {
  REVK_SHARED(shared);
  const auto *w1 = static_cast<const A*>(se.w1), *w2 = static_cast<const A*>(se.w2);
  const int samples = int(se.samples), channels = int(se.channels), rows = int(se.hidden);
  A *dv = reinterpret_cast<A*>(shared), *dhidden = dv + samples * channels;
  for (int i = threadIdx.x; i < samples * channels; i += kMaxThreads) {
    dv[i] = dgate[i] * hardsigmoid_slope(gate[i]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < samples * rows; i += kMaxThreads) {
    const int sample = i / rows, row = i - sample * rows;
    A sum = 0;
#pragma unroll 8
    for (int c = 0; c < channels; ++c) {
      sum = multiply_add(dv[sample * channels + c], w2[c * rows + row], sum);
    }
    dhidden[i] = sum * hardswish_slope(hidden[i]);
  }
  __syncthreads();

  const int first = int(blockIdx.x) * kGradChannels, count = min(kGradChannels, channels - first);
  for (int i = threadIdx.x; i < samples * count; i += kMaxThreads) {
    const int sample = i / count, channel = first + i - sample * count;
    A sum = 0;
#pragma unroll 8
    for (int row = 0; row < rows; ++row) {
      sum = multiply_add(dhidden[sample * rows + row], w1[row * channels + channel], sum);
    }
    static_cast<A*>(grad.dpooled)[sample * channels + channel] = sum * factor;
  }
  for (int i = threadIdx.x; i < rows * count; i += kMaxThreads) {
    const int local = i / rows, channel = first + local, row = i - local * rows;
    A dw1 = 0, dw2 = 0;
    for (int n = 0; n < samples; ++n) {
      const A *at = dhidden + n * rows + row, *of = dv + n * channels + channel;
      dw1 = multiply_add(*at, pooled[n * channels + channel], dw1);
      dw2 = multiply_add(*of, hardswish(hidden[n * rows + row]), dw2);
    }
    static_cast<A*>(grad.dw1)[row * channels + channel] = dw1;
    static_cast<A*>(grad.dw2)[channel * rows + row] = dw2;
  }
  const auto sum_samples = [&](const A* values, int width, void* sums, int begin, int end) {
    for (int i = begin + int(threadIdx.x); i < end; i += kMaxThreads) {
      A sum = 0;
      for (int n = 0; n < samples; ++n) sum += values[n * width + i];
      static_cast<A*>(sums)[i] = sum;
    }
  };
  sum_samples(dv, channels, grad.db2, first, first + count);
  if (first == 0) sum_samples(dhidden, rows, grad.db1, 0, rows);
}

// Weights that a block reads in the time of a launch, and values that fit beside its sums.
constexpr int64_t kBlockWeights = 16384, kBlockHidden = 1024;
// Values of a sample that a block goes through twice in the time of two launches.
constexpr int64_t kBlockSample = 16384;
// Terms of dhidden that a block sums in that time, those that one thread adds in order, and values
// of it and dv that a block holds.
constexpr int64_t kBlockTerms = 65536, kThreadTerms = 1024, kBlockValues = 4096;

// Whether a block does both layers of a sample.
bool is_small(const SqueezeExcite& se) {
  return se.hidden * se.channels <= kBlockWeights && se.hidden <= kBlockHidden;
}

template <size_t Count>
void launch(Dtype dtype, const Product (&given)[Count], Stream stream) {
  Products all;
  unsigned blocks = 0;
  for (size_t i = 0; i < Count; ++i) {
    all.product[i] = given[i];
    blocks += given[i].blocks;
  }
  if (blocks == 0) return;
  const auto run = [&](auto sum) {
    using A = decltype(sum);
    const auto kernel = products_kernel<A>;
    REVK_LAUNCH(kernel, blocks, kMaxThreads, kMaxThreads * sizeof(Sums<A, 20>), stream, all);
  };
  dispatch_sums(dtype, run);
}

}  // namespace

void bn_act_squeeze(Dtype dtype, const Map& x, const Norm& norm, void* partial, void* pooled,
                    Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const PlaneLanes walk({x}, tag);
    dispatch_chunk<T>(walk.vector, [&](auto v) {
      const auto kernel = bn_act_squeeze_kernel<T, decltype(v)::value>;
      REVK_LAUNCH(kernel, walk.blocks(walk.parts), kMaxThreads, kMaxThreads * sizeof(A), stream,
                  walk, x, norm, static_cast<A*>(walk.parts == 1 ? pooled : partial));
    });
    if (walk.parts > 1) {
      fold_parts(dtype, partial, walk.parts, 1, walk.planes, pooled, walk.planes, false, stream);
    }
  });
}

void se_gate(Dtype dtype, const SqueezeExcite& se, const void* pooled, void* hidden, void* gate,
             Stream stream) {
  const int64_t n = se.samples, c = se.channels, r = se.hidden;
  if (is_small(se)) {
    const auto run = [&](auto sum) {
      using A = decltype(sum);
      const auto kernel = gate_kernel<A>;
      REVK_LAUNCH(kernel, unsigned(n), kMaxThreads, (kMaxThreads + r) * sizeof(A), stream, se,
                  GateLanes(se), static_cast<const A*>(pooled), static_cast<A*>(hidden),
                  static_cast<A*>(gate));
    };
    dispatch_sums(dtype, run);
    return;
  }
  Product first(n, r, c, pooled, c, 1, se.w1, 1, c, hidden);
  first.bias = se.b1;
  launch(dtype, {first}, stream);
  Product second(n, c, r, hidden, r, 1, se.w2, 1, r, gate);
  second.a_kind = Operand::hardswish;
  second.kind = Result::hardsigmoid;
  second.bias = se.b2;
  launch(dtype, {second}, stream);
}

void se_gate_act(Dtype dtype, const Map& x, const Norm& norm, const SqueezeExcite& se,
                 void* partial, void* pooled, void* hidden, void* gate, const Output& z,
                 Stream stream) {
  if (!is_small(se) || x.c * x.h * x.w > kBlockSample || x.h * x.w > kBlockPixels) {
    bn_act_squeeze(dtype, x, norm, partial, pooled, stream);
    se_gate(dtype, se, pooled, hidden, gate, stream);
    Norm gated = norm;
    gated.gate = gate;
    return bn_act(dtype, x, gated, z, stream);
  }
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const Map out = map_of(z, x);
    const PlaneLanes walk({x, out}, tag);
    dispatch_chunk<T>(walk.vector, [&](auto v) {
      const auto kernel = gate_act_kernel<T, decltype(v)::value>;
      REVK_LAUNCH(kernel, unsigned(x.n), kMaxThreads, (kMaxThreads + se.hidden) * sizeof(A), stream,
                  walk, x, out, norm, se, GateLanes(se), static_cast<A*>(pooled),
                  static_cast<A*>(hidden), static_cast<A*>(gate));
    });
  });
}

void se_gate_grad(Dtype dtype, const SqueezeExcite& se, const void* dgate, const void* gate,
                  const void* hidden, const void* pooled, int64_t pixels,
                  const SqueezeExciteGrad& grad, Stream stream) {
  const int64_t n = se.samples, c = se.channels, r = se.hidden;
  const bool is_short = ceil_div(n * r, int64_t(kMaxThreads)) * c <= kThreadTerms;
  if (c > 0 && is_short && n * r * c <= kBlockTerms && n * (r + c) <= kBlockValues) {
    const auto run = [&](auto sum) {
      using A = decltype(sum);
      const auto kernel = gate_grad_kernel<A>;
      REVK_LAUNCH(kernel, unsigned(ceil_div(c, kGradChannels)), kMaxThreads,
                  n * (r + c) * sizeof(A), stream, se, static_cast<const A*>(dgate),
                  static_cast<const A*>(gate), static_cast<const A*>(hidden),
                  static_cast<const A*>(pooled), A(1 / double(pixels)), grad);
    };
    dispatch_sums(dtype, run);
    return;
  }
  Product dhidden(n, r, c, dgate, c, 1, se.w2, r, 1, grad.dhidden);
  dhidden.a_kind = Operand::gate_slope;
  dhidden.gate = gate;
  dhidden.kind = Result::hardswish_slope;
  dhidden.hidden = hidden;
  Product dw2(c, r, n, dgate, 1, c, hidden, r, 1, grad.dw2);
  dw2.a_kind = Operand::gate_slope;
  dw2.gate = gate;
  dw2.b_kind = Operand::hardswish;
  dw2.a_sum = grad.db2;
  launch(dtype, {dhidden, dw2}, stream);
  Product dpooled(n, c, r, grad.dhidden, r, 1, se.w1, c, 1, grad.dpooled);
  dpooled.factor = 1 / double(pixels);
  Product dw1(r, c, n, grad.dhidden, 1, r, pooled, c, 1, grad.dw1);
  dw1.a_sum = grad.db1;
  launch(dtype, {dpooled, dw1}, stream);
}

}  // namespace revkernels::cuda
