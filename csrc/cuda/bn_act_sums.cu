// Sums over planes of an activated BatchNorm, u = scale x + shift:
//
//   pooled[n, c]  = sum_hw h(u) / (H W)
//   sums[:, n, c] = sum_hw (dz h(u), dz h'(u), dz h'(u) (x - mean), h'(u), h'(u) (x - mean))
//   sums[:, n, c] = sum_hw (du, du (p - mean)) of the coupling
//
// Per value one or two reads and 8 or 21 FLOPs: bound by memory. A plane's sums are folded as a
// tree, its parts (beyond 16384 pixels) in order: no atomics, and the same bits in any batch.
#include "walk.cuh"

namespace revkernels::cuda {
namespace {

struct Place {
  int64_t plane, sample;
  int channel, part;
  bool exists;

  __device__ __forceinline__ explicit Place(const PlaneLanes& walk) {
    const int group = int(threadIdx.x) / walk.lanes;
    const int64_t index = int64_t(blockIdx.x) * (kMaxThreads / walk.lanes) + group;
    plane = index / walk.parts;
    part = int(index - plane * walk.parts);
    exists = plane < walk.planes;
    sample = plane / walk.channels;
    channel = int(plane - sample * walk.channels);
  }
};

// add(chunk) for the chunks of this thread.
template <int V, class Add>
__device__ __forceinline__ void for_chunks(const PlaneLanes& walk, const Place& place,
                                           const Add& add) {
  if (!place.exists) return;
  const unsigned lane = threadIdx.x & unsigned(walk.lanes - 1);
  const unsigned begin = unsigned(place.part) * walk.part, chunks = walk.pixels / V;
  const unsigned end = chunks - begin < walk.part ? chunks : begin + walk.part;
#pragma unroll 2
  for (unsigned chunk = begin + lane; chunk < end; chunk += unsigned(walk.lanes)) add(chunk);
}

template <class T>
__device__ __forceinline__ const T* plane_of(const Map& m, const Place& place) {
  return static_cast<const T*>(m.data) + place.sample * m.stride_n + place.channel * m.stride_c;
}

// The group's sums: [K, planes] of every part, a sum's rows `stride` apart.
template <class A, int K>
__device__ __forceinline__ void finish(const PlaneLanes& walk, const Place& place,
                                       const Sums<A, K>& sums, A* out, int64_t stride) {
  REVK_SHARED(shared);
  const auto add = [](const Sums<A, K>& a, const Sums<A, K>& b) { return a + b; };
  const Sums<A, K> total = fold_lanes(sums, walk.lanes, reinterpret_cast<Sums<A, K>*>(shared), add);
  if (!place.exists || (threadIdx.x & unsigned(walk.lanes - 1)) != 0) return;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    out[(int64_t(place.part) * K + k) * stride + place.plane] = total.value[k];
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bn_act_squeeze_kernel(const PlaneLanes walk, const Map x, const Norm norm,
                          accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  const Place place(walk);
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
  finish(walk, place, sums, out, walk.planes);
}

template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bn_act_grad_sums_kernel(const PlaneLanes walk, const Map dz, const Map x, const Norm norm,
                            const void* mean, accumulate_t<T>* out, int64_t stride) {
  using A = accumulate_t<T>;
  const Place place(walk);
  Sums<A, 5> sums = {};
  if (place.exists) {
    const A scale = entry<A>(norm.scale, place.channel, A(1));
    const A shift = entry<A>(norm.shift, place.channel, A(0));
    const A center = entry<A>(mean, place.channel, A(0));
    const T *plane = plane_of<T>(x, place), *gradient = plane_of<T>(dz, place);
    for_chunks<V>(walk, place, [&](unsigned chunk) {
      A in[V], din[V];
      walk.load<T>(x, plane, chunk, in);
      walk.load<T>(dz, gradient, chunk, din);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A u = multiply_add(scale, in[i], shift), slope = activation_slope(u, norm.act);
        const A centred = in[i] - center, g = din[i] * slope;
        sums.value[0] = multiply_add(din[i], activate(u, norm.act), sums.value[0]);
        sums.value[1] += g;
        sums.value[2] = multiply_add(g, centred, sums.value[2]);
        sums.value[3] += slope;
        sums.value[4] = multiply_add(slope, centred, sums.value[4]);
      }
    });
  }
  finish(walk, place, sums, out, stride);
}

template <class T, class D, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    coupling_sums_kernel(const PlaneLanes walk, const Map du, const Map p, const void* mean,
                         accumulate_t<T>* out, int64_t stride) {
  using A = accumulate_t<T>;
  const Place place(walk);
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
  finish(walk, place, sums, out, stride);
}

}  // namespace

int64_t plane_parts(const Map& x) { return ceil_div(x.h * x.w, PlaneLanes::kPartPixels); }

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

void bn_act_grad_sums(Dtype dtype, const Map& dz, const Map& x, const Norm& norm, const void* mean,
                      void* partial, void* sums, int64_t stride, Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const PlaneLanes walk({dz, x}, tag);
    const bool whole = walk.parts == 1;
    dispatch_chunk<T>(walk.vector, [&](auto v) {
      const auto kernel = bn_act_grad_sums_kernel<T, decltype(v)::value>;
      REVK_LAUNCH(kernel, walk.blocks(walk.parts), kMaxThreads, kMaxThreads * 5 * sizeof(A), stream,
                  walk, dz, x, norm, mean, static_cast<A*>(whole ? sums : partial),
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

}  // namespace revkernels::cuda
