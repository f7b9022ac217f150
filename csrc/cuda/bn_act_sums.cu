// Sums over planes of an activated BatchNorm, u = scale x + shift:
//
//   pooled[n, c]  = sum_hw h(u) / (H W)
//   sums[:, n, c] = sum_hw (du, du (p - mean)) of the coupling
//
// Per value one or two reads and 3 or 8 FLOPs: bound by memory. A plane's sums are folded as a
// tree, its parts (beyond 16384 pixels) in order: no atomics, and the same bits in any batch.
#include "walk.cuh"

namespace revkernels::cuda {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bn_act_squeeze_kernel(const PlaneLanes walk, const Map x, const Norm norm,
                          accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  const PlanePart place(walk);
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

template <class T, class D, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    coupling_sums_kernel(const PlaneLanes walk, const Map du, const Map p, const void* mean,
                         accumulate_t<T>* out, int64_t stride) {
  using A = accumulate_t<T>;
  const PlanePart place(walk);
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
