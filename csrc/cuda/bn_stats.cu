// Per-channel mean and biased variance over N, H, W, and the affine map that BatchNorm makes of
// them.
//
// First the moments of every plane: a thread runs Welford's recurrence over its chunks of V pixels,
// one per position in the chunk, as those have seen equally many values; per value one read and 4
// FLOPs, bound by memory. Then those of a channel's planes together, and the fold in the same
// launch: a few numbers per channel, bound by latency. Small channels take one launch for all of
// it. All merges are by Chan's formula in a fixed order: no atomics.
#include "walk.cuh"

namespace revkernels::cuda {
namespace {

// What bn_stats leaves of a channel.
struct Results {
  void *mean, *var;
  bool folds;
  Fold fold;
};

template <class A>
__device__ __forceinline__ void fold_channel(const Fold& fold, int64_t c, A mean, A var) {
  const auto n = normalisation(mean, var, static_cast<const A*>(fold.weight)[c],
                               static_cast<const A*>(fold.bias)[c], A(fold.eps));
  static_cast<A*>(fold.rstd)[c] = n.rstd;
  static_cast<A*>(fold.scale)[c] = n.scale;
  static_cast<A*>(fold.shift)[c] = n.shift;
  if (fold.mean != nullptr) static_cast<A*>(fold.mean)[c] = mean;
  const A momentum = A(fold.momentum), unbiased = A(fold.count) / A(fold.count - 1);
  if (fold.running_mean != nullptr) {
    A* running = static_cast<A*>(fold.running_mean) + c;
    *running = moved(*running, mean, momentum);
  }
  if (fold.running_var != nullptr) {
    A* running = static_cast<A*>(fold.running_var) + c;
    *running = moved(*running, var * unbiased, momentum);
  }
  if (fold.batches != nullptr && c == 0) ++*fold.batches;
}

template <class A>
__device__ __forceinline__ void finish(const Results& results, int64_t c, const Moments<A>& all) {
  const A var = all.m2 / all.count;
  static_cast<A*>(results.mean)[c] = all.mean;
  if (results.var != nullptr) static_cast<A*>(results.var)[c] = var;
  if (results.folds) fold_channel(results.fold, c, all.mean, var);
}

struct Merge {
  template <class A>
  __device__ __forceinline__ Moments<A> operator()(const Moments<A>& a, const Moments<A>& b) const {
    return merge(a, b);
  }
};

// Of the plane at `data`, in lane 0 of those that share it; `shared` as in fold_lanes.
template <class T, int V>
__device__ __forceinline__ Moments<accumulate_t<T>> plane_moments(
    const PlaneLanes& walk, const Map& x, const T* data, bool exists,
    Moments<accumulate_t<T>>* shared) {
  using A = accumulate_t<T>;
  const int lane = int(threadIdx.x) & (walk.lanes - 1);
  Moments<A> moments = {A(0), A(0), A(0)};
  if (exists) {
    A mean[V] = {}, m2[V] = {};
    A count = 0;
    const unsigned chunks = walk.pixels / V;
#pragma unroll 2
    for (unsigned chunk = unsigned(lane); chunk < chunks; chunk += unsigned(walk.lanes)) {
      A in[V];
      walk.load<T>(x, data, chunk, in);
      count += A(1);
      const A share = A(1) / count;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A delta = in[j] - mean[j];
        mean[j] = multiply_add(delta, share, mean[j]);
        m2[j] = multiply_add(delta, in[j] - mean[j], m2[j]);
      }
    }
    moments = {count, mean[0], m2[0]};
#pragma unroll
    for (int j = 1; j < V; ++j) moments = merge(moments, Moments<A>{count, mean[j], m2[j]});
  }
  return fold_lanes(moments, walk.lanes, shared, Merge{});
}

// moments[n, c] = mean, sum of squared deviations
template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bn_moments_kernel(const PlaneLanes walk, const Map x, double* out) {
  using A = accumulate_t<T>;
  REVK_SHARED(shared);
  const int group = int(threadIdx.x) / walk.lanes, lane = int(threadIdx.x) & (walk.lanes - 1);
  const int64_t plane = int64_t(blockIdx.x) * (kMaxThreads / walk.lanes) + group;
  const int64_t sample = plane / walk.channels, channel = plane - sample * walk.channels;
  const T* data = static_cast<const T*>(x.data) + sample * x.stride_n + channel * x.stride_c;
  const bool exists = plane < walk.planes;
  const Moments<A> moments =
      plane_moments<T, V>(walk, x, data, exists, reinterpret_cast<Moments<A>*>(shared));
  if (!exists || lane != 0) return;
  out[2 * plane] = moments.mean;
  out[2 * plane + 1] = moments.m2;
}

template <class A>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bn_merge_kernel(const double* moments, int64_t samples, int64_t channels, int64_t area,
                    const Results results) {
  REVK_SHARED(shared);
  const ChannelLane place;
  Moments<A> total = {A(0), A(0), A(0)};
  if (place.channel < channels) {
#pragma unroll 2
    for (int64_t n = place.lane; n < samples; n += kLanes) {
      const double* in = moments + 2 * (n * channels + place.channel);
      total = merge(total, Moments<A>{A(area), A(in[0]), A(in[1])});
    }
  }
  total = place.fold(total, reinterpret_cast<Moments<A>*>(shared), Merge{});
  if (place.lane == 0 && place.channel < channels) finish(results, place.channel, total);
}

// bn_moments_kernel and bn_merge_kernel of one channel, whose planes one block goes through: what
// is added to what is the same.
template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bn_statistics_kernel(const PlaneLanes walk, const Map x, double* moments,
                         const Results results) {
  using A = accumulate_t<T>;
  REVK_SHARED(shared);
  auto* folded = reinterpret_cast<Moments<A>*>(shared);
  const int64_t channel = blockIdx.x;
  const int groups = kMaxThreads / walk.lanes, group = int(threadIdx.x) / walk.lanes;
  const int lane = int(threadIdx.x) & (walk.lanes - 1);
  for (int64_t first = 0; first < x.n; first += groups) {
    const int64_t sample = first + group;
    const T* data = static_cast<const T*>(x.data) + sample * x.stride_n + channel * x.stride_c;
    const Moments<A> found = plane_moments<T, V>(walk, x, data, sample < x.n, folded);
    if (sample < x.n && lane == 0) {
      double* out = moments + 2 * (sample * walk.channels + channel);
      out[0] = found.mean, out[1] = found.m2;
    }
    __syncthreads();  // before `folded` is used again, and for what the block wrote
  }
  Moments<A> total = {A(0), A(0), A(0)};
  if (int(threadIdx.x) < kLanes) {
    for (int64_t n = threadIdx.x; n < x.n; n += kLanes) {
      const double* in = moments + 2 * (n * walk.channels + channel);
      total = merge(total, Moments<A>{A(walk.pixels), A(in[0]), A(in[1])});
    }
  }
  total = fold_lanes(total, kLanes, folded, Merge{});
  if (threadIdx.x == 0) finish(results, channel, total);
}

template <class A>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bn_fold_kernel(int64_t channels, const A* mean, const A* var, const Fold fold) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c < channels) fold_channel(fold, c, mean[c], var[c]);
}

}  // namespace

void bn_moments(Dtype dtype, const Map& x, double* moments, Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const PlaneLanes walk({x}, tag);
    dispatch_chunk<T>(walk.vector, [&](auto v) {
      const auto kernel = bn_moments_kernel<T, decltype(v)::value>;
      REVK_LAUNCH(kernel, walk.blocks(1), kMaxThreads, kMaxThreads * sizeof(Moments<A>), stream,
                  walk, x, moments);
    });
  });
}

void bn_merge(Dtype dtype, const double* moments, int64_t samples, int64_t channels, int64_t area,
              void* mean, void* var, const Fold* fold, Stream stream) {
  const Results results{mean, var, fold != nullptr, fold != nullptr ? *fold : Fold{}};
  dispatch_sums(dtype, [&](auto sum) {
    using A = decltype(sum);
    const auto kernel = bn_merge_kernel<A>;
    REVK_LAUNCH(kernel, unsigned(ceil_div(channels, kChannels)), kMaxThreads,
                kMaxThreads * sizeof(Moments<A>), stream, moments, samples, channels, area,
                results);
  });
}

void bn_statistics(Dtype dtype, const Map& x, double* moments, void* mean, void* var,
                   const Fold* fold, Stream stream) {
  if (x.n * x.h * x.w > kBlockPixels) {  // more blocks than channels are faster
    bn_moments(dtype, x, moments, stream);
    bn_merge(dtype, moments, x.n, x.c, x.h * x.w, mean, var, fold, stream);
    return;
  }
  const Results results{mean, var, fold != nullptr, fold != nullptr ? *fold : Fold{}};
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const PlaneLanes walk({x}, tag);
    dispatch_chunk<T>(walk.vector, [&](auto v) {
      const auto kernel = bn_statistics_kernel<T, decltype(v)::value>;
      REVK_LAUNCH(kernel, unsigned(x.c), kMaxThreads, kMaxThreads * sizeof(Moments<A>), stream,
                  walk, x, moments, results);
    });
  });
}

void bn_fold(Dtype dtype, int64_t channels, const void* mean, const void* var, const Fold& fold,
             Stream stream) {
  constexpr int kThreads = 64;
  dispatch_sums(dtype, [&](auto sum) {
    using A = decltype(sum);
    const auto kernel = bn_fold_kernel<A>;
    REVK_LAUNCH(kernel, unsigned(ceil_div(channels, kThreads)), kThreads, 0, stream, channels,
                static_cast<const A*>(mean), static_cast<const A*>(var), fold);
  });
}

}  // namespace revkernels::cuda
