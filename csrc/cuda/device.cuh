// What every kernel uses: launches, conversions, 16-byte vectors and fast division.
#pragma once

#include "kernels.h"

#if defined(REVK_EMULATE)
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define REVK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define REVK_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define REVK_CHECK_ALIGNED(pointer, bytes)
#endif

namespace revkernels::cuda {

// Room for several blocks on a multiprocessor; 48 KiB is what a block gets without opting in.
constexpr int kTileBytes = 32 << 10;
constexpr int kMaxThreads = 256;

constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

// --- conversions ------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ accumulate_t<T> widen(T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float16>) return __half2float(__ushort_as_half(value.bits));
#endif
  return to_float(value);
}

template <class T>
__device__ __forceinline__ T narrow(accumulate_t<T> value) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float16>) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  }
#endif
  return from_float<T>(value);
}

// Entry i of an array of T, or, if wide, of accumulate_t<T>.
template <class T>
__device__ __forceinline__ accumulate_t<T> load_wide(const void* data, bool wide, int64_t i) {
  return wide ? static_cast<const accumulate_t<T>*>(data)[i]
              : widen(static_cast<const T*>(data)[i]);
}

// Calls f with a value of the dtype's storage type.
template <class F>
void dispatch(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::float64:
      return f(double{});
    case Dtype::float16:
      return f(float16{});
    case Dtype::bfloat16:
      return f(bfloat16{});
    case Dtype::int16:
      break;
  }
}

// Likewise, of the type that sums are kept in.
template <class F>
void dispatch_sums(Dtype dtype, const F& f) {
  dtype == Dtype::float64 ? f(double{}) : f(float{});
}

// --- vectors ----------------------------------------------------------------------------------

template <int Bytes>
struct Words;
template <>
struct Words<2> {
  using type = uint16_t;
};
template <>
struct Words<4> {
  using type = uint32_t;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<16> {
  using type = uint4;
};

// N values moved as one word of up to 16 bytes; the pointer must be aligned to it.
template <class T, int N>
struct Vector {
  using Word = typename Words<sizeof(T) * N>::type;
  T value[N];

  static __device__ __forceinline__ Vector load(const T* from) {
    REVK_CHECK_ALIGNED(from, sizeof(Word));
    const Word word = *reinterpret_cast<const Word*>(from);
    Vector vector;
    memcpy(vector.value, &word, sizeof(Word));
    return vector;
  }
  __device__ __forceinline__ void store(T* to) const {
    REVK_CHECK_ALIGNED(to, sizeof(Word));
    Word word;
    memcpy(&word, value, sizeof(Word));
    *reinterpret_cast<Word*>(to) = word;
  }
};

template <class T>
constexpr int kVector = 16 / sizeof(T);

// N consecutive sums from shared memory, aligned to Align of them.
template <int N, int Align, class A>
__device__ __forceinline__ void load_sums(const A* from, A (&to)[N]) {
  constexpr int V = Align < kVector<A> ? Align : kVector<A>;
  static_assert(N % V == 0);
#pragma unroll
  for (int i = 0; i < N; i += V) {
    const auto vector = Vector<A, V>::load(from + i);
#pragma unroll
    for (int j = 0; j < V; ++j) to[i + j] = vector.value[j];
  }
}

template <int V, class T, int N>
__device__ __forceinline__ void store_vectors(T* to, const accumulate_t<T> (&from)[N], int count,
                                              bool add) {
  if constexpr (V <= N && V <= kVector<T>) {
#pragma unroll
    for (int i = 0; i < N; i += V) {
      if (i >= count) break;
      Vector<T, V> vector = {};
      if (add) vector = Vector<T, V>::load(to + i);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        vector.value[j] = narrow<T>(add ? widen(vector.value[j]) + from[i + j] : from[i + j]);
      }
      vector.store(to + i);
    }
  }
}

// Writes the first `count` of N values, or adds them to what is there; `width` (see store_width)
// divides their position and count.
template <class T, int N>
__device__ __forceinline__ void store_row(T* to, const accumulate_t<T> (&from)[N], int count,
                                          int width, bool add = false) {
  switch (width) {
    case 8:
      return store_vectors<8>(to, from, count, add);
    case 4:
      return store_vectors<4>(to, from, count, add);
    case 2:
      return store_vectors<2>(to, from, count, add);
    default:
      return store_vectors<1>(to, from, count, add);
  }
}

// How many values at a time rows of `row` values can be written in, when each thread writes N of
// them.
template <class T, int N>
int store_width(const void* data, int64_t row) {
  int width = N < kVector<T> ? N : kVector<T>;
  while (row % width != 0 || reinterpret_cast<uintptr_t>(data) % (width * sizeof(T)) != 0)
    width /= 2;
  return width;
}

// Likewise of an output with such rows.
template <class T, int N>
int store_width(const Output& out, int64_t row) {
  int width = store_width<T, N>(out.data, row);
  while (out.stride_n % width != 0 || out.stride_c % width != 0) width /= 2;
  return width;
}

// --- division ---------------------------------------------------------------------------------

// Division by a launch's constant as one multiplication; exact while numerator * divisor < 2^32.
struct Divisor {
  uint32_t divisor, reciprocal;

  explicit Divisor(int64_t d)
      : divisor(uint32_t(d)), reciprocal(d == 1 ? 0 : uint32_t(((1ull << 32) + d - 1) / d)) {}

  __device__ __forceinline__ int quotient(int n) const {
    return divisor == 1 ? n : int(__umulhi(uint32_t(n), reciprocal));
  }
  // Returns n / divisor and leaves the remainder in n.
  __device__ __forceinline__ int split(int& n) const {
    const int q = quotient(n);
    n -= q * int(divisor);
    return q;
  }
};

// --- one thread per item of a map -------------------------------------------------------------

// Items are numbered within a plane; small planes share a block, large ones take several.
struct ItemGrid {
  int64_t planes, items;
  int planes_per_block, blocks_per_plane;

  ItemGrid(int64_t planes, int64_t items)
      : planes(planes),
        items(items),
        planes_per_block(items < kMaxThreads ? int(kMaxThreads / items) : 1),
        blocks_per_plane(int(ceil_div(items, kMaxThreads))) {}

  unsigned blocks() const {
    return unsigned(ceil_div(planes, planes_per_block) * blocks_per_plane);
  }

  // Whether this thread has an item, and which.
  __device__ __forceinline__ bool locate(int64_t& plane, int& item) const {
    const unsigned group = blockIdx.x / unsigned(blocks_per_plane);
    const unsigned part = blockIdx.x - group * unsigned(blocks_per_plane);
    const unsigned index = part * kMaxThreads + threadIdx.x;
    const unsigned local = planes_per_block == 1 ? 0u : index / unsigned(items);
    plane = int64_t(group) * planes_per_block + local;
    item = int(index - local * unsigned(items));
    return int(local) < planes_per_block && plane < planes && item < items;
  }
};

}  // namespace revkernels::cuda
