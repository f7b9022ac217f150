// The gradient of an activated BatchNorm, u = scale x + shift, from that of z = gate h(u), whose
// mean over the pixels had dpool H W:
//
//   sums[:, n, c] = sum_hw (dz h(u), dz h'(u), dz h'(u) (x - mean), h'(u), h'(u) (x - mean))
//                   or of the coupling's, without h: sum_hw (dz, dz (x - mean))
//   sum, centred  = sum_n gate sums[1, 2] + dpool sums[3, 4]
//   dgamma = rstd centred    dbeta = sum    slope, offset: what both leave of the input's, of those
//   dx = scale (gate dz + dpool) h'(u) + slope x + offset
//
// Sums, per value two reads and 21 FLOPs, and the map, two reads, one write and 12 FLOPs, are bound
// by memory; the fold of a few numbers per channel by latency. Small channels take one launch for
// the fold and the map, or for all. A plane's sums are folded as a tree, its parts (beyond 16384
// pixels) in order, the samples as a tree: no atomics, and the same bits in any number of launches.
// A value of the map depends on its own inputs alone, in formulas that no compiler contracts.
#include "walk.cuh"

namespace revkernels::cuda {
namespace {

// --- sums over planes -------------------------------------------------------------------------

// The five sums of a group's part of a plane, and z of it where that has data.
template <class T, int V>
__device__ __forceinline__ void sum_plane(const PlaneLanes& walk, const PlanePart& place,
                                          const Map& dz, const Map& x, const Map& z,
                                          const Norm& norm, const void* mean, accumulate_t<T>* out,
                                          int64_t stride) {
  using A = accumulate_t<T>;
  Sums<A, 5> sums = {};
  if (place.exists) {
    const A scale = entry<A>(norm.scale, place.channel, A(1));
    const A shift = entry<A>(norm.shift, place.channel, A(0));
    const A center = entry<A>(mean, place.channel, A(0));
    const A gate = entry<A>(norm.gate, place.plane, A(1));
    const T *plane = plane_of<T>(x, place), *gradient = plane_of<T>(dz, place);
    T* to = const_cast<T*>(plane_of<T>(z, place));
    for_chunks<V>(walk, place, [&](unsigned chunk) {
      A in[V], din[V];
      walk.load<T>(x, plane, chunk, in);
      walk.load<T>(dz, gradient, chunk, din);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A u = multiply_add(scale, in[i], shift), slope = activation_slope(u, norm.act);
        const A centred = in[i] - center, g = din[i] * slope, active = activate(u, norm.act);
        in[i] = gate * active;
        sums.value[0] = multiply_add(din[i], active, sums.value[0]);
        sums.value[1] += g;
        sums.value[2] = multiply_add(g, centred, sums.value[2]);
        sums.value[3] += slope;
        sums.value[4] = multiply_add(slope, centred, sums.value[4]);
      }
      if (z.data != nullptr) walk.store<T>(z, to, chunk, in);
    });
  }
  finish_sums(walk, place, sums, out, stride);
}

template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bn_act_grad_sums_kernel(const PlaneLanes walk, const Map dz, const Map x, const Map z,
                            const Norm norm, const void* mean, accumulate_t<T>* out,
                            int64_t stride) {
  sum_plane<T, V>(walk, PlanePart(walk), dz, x, z, norm, mean, out, stride);
}

// The coupling's two sums.
template <class T, class D, int V>
__device__ __forceinline__ void sum_coupled_plane(const PlaneLanes& walk, const PlanePart& place,
                                                  const Map& du, const Map& p, const void* mean,
                                                  accumulate_t<T>* out, int64_t stride) {
  using A = accumulate_t<T>;
  Sums<A, 2> sums = {};
  if (place.exists) {
    const A center = entry<A>(mean, place.channel, A(0));
    const T* plane = plane_of<T>(p, place);
    const D* gradient = plane_of<D>(du, place);
    for_chunks<V>(walk, place, [&](unsigned chunk) {
      A in[V], din[V];
      walk.load<T>(p, plane, chunk, in);
      walk.load<D>(du, gradient, chunk, din);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sums.value[0] += din[i];
        sums.value[1] = multiply_add(din[i], in[i] - center, sums.value[1]);
      }
    });
  }
  finish_sums(walk, place, sums, out, stride);
}

template <class T, class D, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    coupling_sums_kernel(const PlaneLanes walk, const Map du, const Map p, const void* mean,
                         accumulate_t<T>* out, int64_t stride) {
  sum_coupled_plane<T, D, V>(walk, PlanePart(walk), du, p, mean, out, stride);
}

// --- their fold over samples ------------------------------------------------------------------

// A lane's share of the sums over samples of a channel's g and g (x - mean).
template <class A>
__device__ __forceinline__ Sums<A, 2> samples_of(const FoldGrad& args, int64_t c, int lane) {
  const auto* sums = static_cast<const A*>(args.sums) + (args.five ? args.sum_stride : 0);
  Sums<A, 2> total = {};
#pragma unroll 2
  for (int64_t n = lane; n < args.samples; n += kLanes) {
    const A* at = sums + n * args.channels + c;
    const A gate = entry<A>(args.gate, n * args.gate_stride_n + c * args.gate_stride_c, A(1));
    A &sum = total.value[0], &centred = total.value[1];
    sum = multiply_add(gate, at[0], sum);
    centred = multiply_add(gate, at[args.sum_stride], centred);
    if (args.dpool == nullptr) continue;
    const A dpool = static_cast<const A*>(args.dpool)[n * args.channels + c];
    sum = multiply_add(dpool, at[2 * args.sum_stride], sum);
    centred = multiply_add(dpool, at[3 * args.sum_stride], centred);
  }
  return total;
}

// A channel's gradients from those sums over all samples.
template <class A>
__device__ __forceinline__ NormalisationGrad<A> fold_channel(const FoldGrad& args, int64_t c,
                                                             const Sums<A, 2>& total) {
  const auto grad =
      normalisation_grad(total.value[0], total.value[1], static_cast<const A*>(args.mean)[c],
                         static_cast<const A*>(args.rstd)[c], static_cast<const A*>(args.scale)[c],
                         A(args.count), args.batch);
  static_cast<A*>(args.dweight)[c] = grad.dweight;
  static_cast<A*>(args.dbias)[c] = grad.dbias;
  if (args.slope != nullptr) {
    static_cast<A*>(args.slope)[c] = grad.slope;
    static_cast<A*>(args.offset)[c] = grad.offset;
  }
  return grad;
}

struct Add {
  template <class A, int K>
  __device__ __forceinline__ Sums<A, K> operator()(const Sums<A, K>& a, const Sums<A, K>& b) const {
    return a + b;
  }
};

template <class A>
__global__ void __launch_bounds__(kMaxThreads, 1) bn_fold_grad_kernel(const FoldGrad args) {
  REVK_SHARED(shared);
  const ChannelLane place;
  const bool exists = place.channel < args.channels;
  Sums<A, 2> total = {};
  if (exists) total = samples_of<A>(args, place.channel, place.lane);
  total = place.fold(total, reinterpret_cast<Sums<A, 2>*>(shared), Add{});
  if (place.lane == 0 && exists) fold_channel(args, place.channel, total);
}

// --- the map ----------------------------------------------------------------------------------

template <class A>
struct Backward {
  A scale, shift, gate, dpool, slope, offset;

  __device__ __forceinline__ A operator()(A dz, A x, Activation act) const {
    const A g =
        multiply_add(gate, dz, dpool) * activation_slope(multiply_add(scale, x, shift), act);
    return multiply_add(scale, g, multiply_add(slope, x, offset));
  }
};

template <class T, class D, int V>
__global__ void __launch_bounds__(kMaxThreads)
    bn_act_grad_kernel(const Walk walk, const Map dz, const Map x, const Map dx, const Norm norm,
                       const NormGrad grad) {
  using A = accumulate_t<T>;
  Spot spot;
  if (!walk.locate<V>(spot)) return;
  T in[V];
  D din[V];
  walk.load(x, spot, in);
  walk.load(dz, spot, din);
  A out[V];
  const auto read = [&](int64_t plane, int c) {
    return Backward<A>{entry<A>(norm.scale, c, A(1)),
                       entry<A>(norm.shift, c, A(0)),
                       entry<A>(norm.gate, plane_gate(norm, plane, c, walk.channels), A(1)),
                       entry<A>(grad.dpool, plane, A(0)),
                       entry<A>(grad.slope, c, A(0)),
                       entry<A>(grad.offset, c, A(0))};
  };
  walk.for_each<V>(spot, read, [&](int i, const Backward<A>& k) {
    out[i] = k(widen(din[i]), widen(in[i]), norm.act);
  });
  walk.store<T>(dx, spot, out);
}

// All of it for one channel, whose planes one block goes through: what is added to what is the
// same. The sums are there already where `sums` is null.
template <class T, class D, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bn_grad_kernel(const PlaneLanes walk, const Map dz, const Map x, const Map dx, const Norm norm,
                   const FoldGrad args, accumulate_t<T>* sums) {
  using A = accumulate_t<T>;
  REVK_SHARED(shared);
  const int channel = int(blockIdx.x);
  const int groups = kMaxThreads / walk.lanes, group = int(threadIdx.x) / walk.lanes;
  for (int64_t first = 0; first < x.n && sums != nullptr; first += groups) {
    const PlanePart place(walk, first + group, channel);
    if (!args.five) {
      sum_coupled_plane<T, D, V>(walk, place, dz, x, args.mean, sums, args.sum_stride);
    } else if constexpr (std::is_same_v<T, D>) {
      sum_plane<T, V>(walk, place, dz, x, Map{}, norm, args.mean, sums, args.sum_stride);
    }
    __syncthreads();  // before `shared` is used again, and for what the block wrote
  }
  Sums<A, 2> total = {};
  if (int(threadIdx.x) < kLanes) total = samples_of<A>(args, channel, int(threadIdx.x));
  total = fold_lanes(total, kLanes, reinterpret_cast<Sums<A, 2>*>(shared), Add{});
  __syncthreads();
  auto* grad = reinterpret_cast<NormalisationGrad<A>*>(shared);
  if (threadIdx.x == 0) *grad = fold_channel(args, channel, total);
  __syncthreads();
  Backward<A> k{entry<A>(norm.scale, channel, A(1)),
                entry<A>(norm.shift, channel, A(0)),
                A(1),
                A(0),
                grad->slope,
                grad->offset};
  for (int64_t sample = group; sample < x.n; sample += groups) {
    const PlanePart place(walk, sample, channel);
    k.gate = entry<A>(args.gate, sample * args.gate_stride_n + channel * args.gate_stride_c, A(1));
    k.dpool = entry<A>(args.dpool, place.plane, A(0));
    const T* plane = plane_of<T>(x, place);
    const D* gradient = plane_of<D>(dz, place);
    T* to = const_cast<T*>(plane_of<T>(dx, place));
    for_chunks<V>(walk, place, [&](unsigned chunk) {
      A in[V], din[V];
      walk.load<T>(x, plane, chunk, in);
      walk.load<D>(dz, gradient, chunk, din);
#pragma unroll
      for (int i = 0; i < V; ++i) in[i] = k(din[i], in[i], norm.act);
      walk.store<T>(dx, to, chunk, in);
    });
  }
}

}  // namespace

int64_t plane_parts(const Map& x) { return ceil_div(x.h * x.w, PlaneLanes::kPartPixels); }

void bn_act_grad_sums(Dtype dtype, const Map& dz, const Map& x, const Norm& norm, const void* mean,
                      void* partial, void* sums, int64_t stride, const Output* z, Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const Map out = z == nullptr ? Map{} : map_of(*z, x);
    const PlaneLanes walk({dz, x, z == nullptr ? x : out}, tag);
    const bool whole = walk.parts == 1;
    dispatch_chunk<T>(walk.vector, [&](auto v) {
      const auto kernel = bn_act_grad_sums_kernel<T, decltype(v)::value>;
      REVK_LAUNCH(kernel, walk.blocks(walk.parts), kMaxThreads, kMaxThreads * 5 * sizeof(A), stream,
                  walk, dz, x, out, norm, mean, static_cast<A*>(whole ? sums : partial),
                  whole ? stride : walk.planes);
    });
    if (!whole) fold_parts(dtype, partial, walk.parts, 5, walk.planes, sums, stride, false, stream);
  });
}

void coupling_sums(Dtype dtype, Dtype du_dtype, const Map& du, const Map& p, const void* mean,
                   void* partial, void* sums, int64_t stride, Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const auto launch = [&](auto gradient) {
      using D = decltype(gradient);
      const PlaneLanes walk({du, p}, gradient);  // chunks of the wider type
      const bool whole = walk.parts == 1;
      dispatch_chunk<D>(walk.vector, [&](auto v) {
        const auto kernel = coupling_sums_kernel<T, D, decltype(v)::value>;
        REVK_LAUNCH(kernel, walk.blocks(walk.parts), kMaxThreads, kMaxThreads * 2 * sizeof(A),
                    stream, walk, du, p, mean, static_cast<A*>(whole ? sums : partial),
                    whole ? stride : walk.planes);
      });
      if (!whole) {
        fold_parts(dtype, partial, walk.parts, 2, walk.planes, sums, stride, false, stream);
      }
    };
    if (du_dtype == dtype) return launch(tag);
    if constexpr (sizeof(T) == 2) launch(float{});
  });
}

void bn_fold_grad(Dtype dtype, const FoldGrad& args, Stream stream) {
  dispatch_sums(dtype, [&](auto sum) {
    using A = decltype(sum);
    const auto kernel = bn_fold_grad_kernel<A>;
    REVK_LAUNCH(kernel, unsigned(ceil_div(args.channels, kChannels)), kMaxThreads,
                kMaxThreads * sizeof(Sums<A, 2>), stream, args);
  });
}

void bn_act_grad(Dtype dtype, Dtype dz_dtype, const Map& dz, const Map& x, const Norm& norm,
                 const NormGrad& grad, const Output& dx, Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto launch = [&](auto gradient) {
      using D = decltype(gradient);
      constexpr int V = kVector<D>;
      const Map out = map_of(dx, x);
      const Walk walk({dz, x, out}, {int(sizeof(D)), int(sizeof(T)), int(sizeof(T))}, V);
      dispatch_vector<V>(walk, [&](auto v) {
        const auto kernel = bn_act_grad_kernel<T, D, decltype(v)::value>;
        REVK_LAUNCH(kernel, walk.grid.blocks(), kMaxThreads, 0, stream, walk, dz, x, out, norm,
                    grad);
      });
    };
    if (dz_dtype == dtype) return launch(tag);
    if constexpr (sizeof(T) == 2) launch(float{});
  });
}

void bn_grad(Dtype dtype, Dtype dz_dtype, const Map& dz, const Map& x, const Norm& norm,
             const FoldGrad& args, void* sums, void* partial, const Output& dx, Stream stream) {
  if (x.n * x.h * x.w > kBlockPixels) {  // more blocks than channels are faster
    if (sums != nullptr && args.five) {
      bn_act_grad_sums(dtype, dz, x, norm, args.mean, partial, sums, args.sum_stride, nullptr,
                       stream);
    } else if (sums != nullptr) {
      coupling_sums(dtype, dz_dtype, dz, x, args.mean, partial, sums, args.sum_stride, stream);
    }
    bn_fold_grad(dtype, args, stream);
    Norm gated = norm;
    gated.gate = args.gate;
    gated.gate_stride_n = args.gate_stride_n, gated.gate_stride_c = args.gate_stride_c;
    bn_act_grad(dtype, dz_dtype, dz, x, gated, {args.dpool, args.slope, args.offset}, dx, stream);
    return;
  }
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const auto launch = [&](auto gradient) {
      using D = decltype(gradient);
      const Map out = map_of(dx, x);
      const PlaneLanes walk({dz, x, out}, gradient);  // chunks of the wider type
      dispatch_chunk<D>(walk.vector, [&](auto v) {
        const auto kernel = bn_grad_kernel<T, D, decltype(v)::value>;
        REVK_LAUNCH(kernel, unsigned(x.c), kMaxThreads, kMaxThreads * sizeof(Sums<A, 5>), stream,
                    walk, dz, x, out, norm, args, static_cast<A*>(sums));
      });
    };
    if (dz_dtype == dtype) return launch(tag);
    if constexpr (sizeof(T) == 2) launch(float{});
  });
}

}  // namespace revkernels::cuda
