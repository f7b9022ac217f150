// How kernels walk maps of one shape: element by element in vectors, or plane by plane into sums.
#pragma once

#include "device.cuh"

namespace revkernels::cuda {

// A map to be written, its planes without gaps and strides as a Map's.
inline Map map_of(const Output& out, const Map& like) {
  return {out.data, like.n, like.c, like.h, like.w, out.stride_n, out.stride_c, like.w, 1};
}

// Whether every plane starts at a multiple of `count` values of `bytes` bytes.
inline bool starts_at_multiples(const Map& m, int64_t count, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(m.data) % (count * bytes) == 0 &&
         (m.n == 1 || m.stride_n % count == 0) && (m.c == 1 || m.stride_c % count == 0);
}

// --- element by element -----------------------------------------------------------------------

// A thread's values: `count` from `pixel` of a plane on; they may reach into the planes behind it.
struct Spot {
  int64_t sample;
  int channel;
  unsigned pixel;
  int count;
};

// One thread per `vector` consecutive values of a run. A run is a sample whose planes follow one
// another in every map, else a plane.
struct Walk {
  ItemGrid grid;
  int channels, planes;  // of a sample, of a run
  unsigned pixels, width;
  bool dense;  // every run lies in memory as it is numbered
  int vector;

  // `widest`: values of a vector; every map has as many bytes for it as its own type takes.
  template <size_t Maps>
  Walk(const Map (&maps)[Maps], const int (&bytes)[Maps], int widest)
      : grid(1, 1),
        channels(int(maps[0].c)),
        planes(channels),
        pixels(unsigned(maps[0].h * maps[0].w)),
        width(unsigned(maps[0].w)),
        dense(true),
        vector(widest) {
    bool whole = int64_t(channels) * pixels <= INT32_MAX;
    for (const Map& m : maps) {
      dense = dense && is_dense(m);
      whole = whole && (m.c == 1 || m.stride_c == int64_t(pixels));
    }
    if (!dense || !whole) planes = 1;
    for (size_t i = 0; i < Maps; ++i) {
      Map m = maps[i];
      if (planes > 1) m.c = 1;
      if (!dense || !starts_at_multiples(m, vector, bytes[i])) vector = 1;
    }
    grid = ItemGrid(maps[0].n * (channels / planes), ceil_div(int64_t(planes) * pixels, vector));
  }

  template <int V>
  __device__ __forceinline__ bool locate(Spot& spot) const {
    int64_t run;
    int item;
    if (!grid.locate(run, item)) return false;
    const unsigned first = unsigned(item) * V, left = unsigned(planes) * pixels - first;
    spot.count = left < unsigned(V) ? int(left) : V;
    if (planes == 1) {
      spot.sample = run / channels;
      spot.channel = int(run - spot.sample * channels);
      spot.pixel = first;
    } else {
      spot.sample = run;
      spot.channel = int(first / pixels);
      spot.pixel = first - unsigned(spot.channel) * pixels;
    }
    return true;
  }

  __device__ __forceinline__ int64_t offset(const Map& m, const Spot& spot) const {
    const int64_t plane = spot.sample * m.stride_n + spot.channel * m.stride_c;
    if (dense) return plane + spot.pixel;
    const unsigned row = spot.pixel / width;
    return plane + row * m.stride_h + (spot.pixel - row * width) * m.stride_w;
  }

  template <class T, int V>
  __device__ __forceinline__ void load(const Map& m, const Spot& spot, T (&to)[V]) const {
    const T* from = static_cast<const T*>(m.data) + offset(m, spot);
    if (V > 1 && spot.count == V) {
      const auto vector = Vector<T, V>::load(from);
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = vector.value[i];
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = i < spot.count ? from[i] : T{};
    }
  }

  template <class T, int V>
  __device__ __forceinline__ void store(const Map& m, const Spot& spot,
                                        const accumulate_t<T> (&from)[V]) const {
    T* to = static_cast<T*>(const_cast<void*>(m.data)) + offset(m, spot);
    if (V > 1 && spot.count == V) {
      Vector<T, V> vector;
#pragma unroll
      for (int i = 0; i < V; ++i) vector.value[i] = narrow<T>(from[i]);
      vector.store(to);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (i < spot.count) to[i] = narrow<T>(from[i]);
      }
    }
  }

  // compute(i, coefficients) for each value, with those of its plane: read(sample C + c, c).
  template <int V, class Read, class Compute>
  __device__ __forceinline__ void for_each(const Spot& spot, const Read& read,
                                           const Compute& compute) const {
    const int64_t plane = spot.sample * channels;
    int channel = spot.channel;
    unsigned left = pixels - spot.pixel;
    auto coefficients = read(plane + channel, channel);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (left == 0 && i < spot.count) {
        ++channel;
        left = pixels;
        coefficients = read(plane + channel, channel);
      }
      --left;
      compute(i, coefficients);
    }
  }
};

// Calls f with the vectors' length as a constant: V or 1.
template <int V, class F>
void dispatch_vector(const Walk& walk, const F& f) {
  if (walk.vector == V) return f(std::integral_constant<int, V>{});
  f(std::integral_constant<int, 1>{});
}

// Entry i of an optional vector.
template <class A>
__device__ __forceinline__ A entry(const void* vector, int64_t i, A absent) {
  return vector == nullptr ? absent : static_cast<const A*>(vector)[i];
}

// Where a plane's gate lies: [N, C] without gaps unless the norm says otherwise.
__device__ __forceinline__ int64_t plane_gate(const Norm& norm, int64_t plane, int c,
                                              int channels) {
  if (norm.gate_stride_n == 0) return plane;
  return (plane - c) / channels * norm.gate_stride_n + c * norm.gate_stride_c;
}

// --- plane by plane ---------------------------------------------------------------------------

// A plane is summed by `lanes` threads, a large one in several parts of `part` chunks: lane l takes
// the chunks l, l + lanes, ... of V consecutive pixels. Which value is added where depends on the
// plane's size and dtype alone, not on layout, alignment or batch.
struct PlaneLanes {
  int64_t planes;
  int channels;
  unsigned pixels, width;
  int vector, lanes, parts;
  unsigned part;
  bool dense, aligned;  // whether pixels follow one another, and chunks can be loaded whole

  static constexpr unsigned kPartPixels = 16384;

  template <class T, size_t Maps>
  PlaneLanes(const Map (&maps)[Maps], T)
      : planes(maps[0].n * maps[0].c),
        channels(int(maps[0].c)),
        pixels(unsigned(maps[0].h * maps[0].w)),
        width(unsigned(maps[0].w)),
        vector(kVector<T>),
        lanes(8),
        dense(true),
        aligned(true) {
    while (pixels % unsigned(vector) != 0) vector = vector == 8 ? 4 : 1;
    const unsigned chunks = pixels / unsigned(vector);
    while (lanes < kMaxThreads && unsigned(lanes) * 4 < chunks) lanes *= 2;
    part = kPartPixels / unsigned(vector);
    parts = int((chunks + part - 1) / part);
    for (const Map& m : maps) {
      dense = dense && is_dense(m);
      aligned = aligned && starts_at_multiples(m, vector, sizeof(T));
    }
    aligned = aligned && dense;
  }

  unsigned blocks(int64_t parts) const {
    return unsigned(ceil_div(planes * parts, kMaxThreads / lanes));
  }

  // The first of the chunk's V values.
  template <class T, int V>
  __device__ __forceinline__ void load(const Map& m, const T* plane, unsigned chunk,
                                       accumulate_t<T> (&to)[V]) const {
    const unsigned first = chunk * V;
    if (aligned) {
      const auto vector = Vector<T, V>::load(plane + first);
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = widen(vector.value[i]);
    } else if (dense) {
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = widen(plane[first + i]);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const unsigned row = (first + i) / width;
        to[i] = widen(plane[row * m.stride_h + (first + i - row * width) * m.stride_w]);
      }
    }
  }

  template <class T, int V>
  __device__ __forceinline__ void store(const Map& m, T* plane, unsigned chunk,
                                        const accumulate_t<T> (&from)[V]) const {
    const unsigned first = chunk * V;
    if (aligned) {
      Vector<T, V> vector;
#pragma unroll
      for (int i = 0; i < V; ++i) vector.value[i] = narrow<T>(from[i]);
      vector.store(plane + first);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const unsigned row = (first + i) / width;
        plane[row * m.stride_h + (first + i - row * width) * m.stride_w] = narrow<T>(from[i]);
      }
    }
  }
};

// Calls f with the chunks' length as a constant.
template <class T, class F>
void dispatch_chunk(int vector, const F& f) {
  if constexpr (kVector<T> == 8) {
    if (vector == 8) return f(std::integral_constant<int, 8>{});
  }
  if constexpr (kVector<T> >= 4) {
    if (vector == 4) return f(std::integral_constant<int, 4>{});
  }
  if constexpr (kVector<T> == 2) {
    if (vector == 2) return f(std::integral_constant<int, 2>{});
  }
  f(std::integral_constant<int, 1>{});
}

// Leaves in lane 0 of each group of `lanes` threads (a power of two) what combine makes of all of
// them, as a tree: always in the same order. `shared` has room for a value of every thread, and may
// be used again after a barrier.
template <class V, class Combine>
__device__ __forceinline__ V fold_lanes(V value, int lanes, V* shared, const Combine& combine) {
  const int lane = int(threadIdx.x) & (lanes - 1);
  shared[threadIdx.x] = value;
  for (int half = lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) {
      value = combine(value, shared[threadIdx.x + half]);
      shared[threadIdx.x] = value;
    }
  }
  return value;
}

// K numbers that are added up together.
template <class A, int K>
struct Sums {
  A value[K];

  __device__ __forceinline__ Sums operator+(const Sums& other) const {
    Sums total;
#pragma unroll
    for (int k = 0; k < K; ++k) total.value[k] = value[k] + other.value[k];
    return total;
  }
};

// A group of lanes' part of a plane, whose number counts the groups of a launch.
struct PlanePart {
  int64_t plane, sample;
  int channel, part;
  bool exists;

  __device__ __forceinline__ explicit PlanePart(const PlaneLanes& walk) {
    const int group = int(threadIdx.x) / walk.lanes;
    const int64_t index = int64_t(blockIdx.x) * (kMaxThreads / walk.lanes) + group;
    plane = index / walk.parts;
    part = int(index - plane * walk.parts);
    exists = plane < walk.planes;
    sample = plane / walk.channels;
    channel = int(plane - sample * walk.channels);
  }

  // All of a plane.
  __device__ __forceinline__ PlanePart(const PlaneLanes& walk, int64_t sample, int channel)
      : plane(sample * walk.channels + channel),
        sample(sample),
        channel(channel),
        part(0),
        exists(channel < walk.channels && plane < walk.planes) {}
};

// add(chunk) for the chunks of this thread.
template <int V, class Add>
__device__ __forceinline__ void for_chunks(const PlaneLanes& walk, const PlanePart& place,
                                           const Add& add) {
  if (!place.exists) return;
  const unsigned lane = threadIdx.x & unsigned(walk.lanes - 1);
  const unsigned begin = unsigned(place.part) * walk.part, chunks = walk.pixels / V;
  const unsigned end = chunks - begin < walk.part ? chunks : begin + walk.part;
#pragma unroll 2
  for (unsigned chunk = begin + lane; chunk < end; chunk += unsigned(walk.lanes)) add(chunk);
}

template <class T>
__device__ __forceinline__ const T* plane_of(const Map& m, const PlanePart& place) {
  return static_cast<const T*>(m.data) + place.sample * m.stride_n + place.channel * m.stride_c;
}

// The group's sums: [K, planes] of every part, a sum's rows `stride` apart.
template <class A, int K>
__device__ __forceinline__ void finish_sums(const PlaneLanes& walk, const PlanePart& place,
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

// --- channel by channel -----------------------------------------------------------------------

// What a block alone goes through in the time of a launch.
constexpr int64_t kBlockPixels = 8192;

// kLanes threads share a channel's samples, kChannels neighbouring channels are read together.
constexpr int kChannels = 8, kLanes = kMaxThreads / kChannels;

struct ChannelLane {
  int64_t channel;
  int local, lane;

  __device__ __forceinline__ ChannelLane()
      : local(int(threadIdx.x) % kChannels), lane(int(threadIdx.x) / kChannels) {
    channel = int64_t(blockIdx.x) * kChannels + local;
  }

  // What combine makes of a channel's lanes, in its lane 0.
  template <class V, class Combine>
  __device__ __forceinline__ V fold(const V& value, V* shared, const Combine& combine) const {
    V total = value;
    shared[threadIdx.x] = value;
    for (int half = kLanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) {
        total = combine(total, shared[threadIdx.x + half * kChannels]);
        shared[threadIdx.x] = total;
      }
    }
    return total;
  }
};

}  // namespace revkernels::cuda
