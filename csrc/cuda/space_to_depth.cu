// Space-to-depth with repeated planes, and its transpose:
//
//   y[n, (r B + q) planes + p, i, j] = x[n, p mod C, i B + r, j B + q]
//
// A permutation: every value is read and written once, no FLOPs, bound by memory. A thread moves B
// neighbours of a row of x, one for each q: they are one vector on x's side, and on y's side a
// warp's values are neighbours along j.
#include "device.cuh"

namespace revkernels::cuda {
namespace {

// B neighbours of a row, as vectors where `aligned`.
template <class T, int B>
__device__ __forceinline__ void load_neighbours(const T* from, int64_t stride, bool aligned,
                                                T (&to)[B]) {
  constexpr int V = B < kVector<T> ? B : kVector<T>;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < B; i += V) {
      const auto vector = Vector<T, V>::load(from + i);
#pragma unroll
      for (int j = 0; j < V; ++j) to[i + j] = vector.value[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < B; ++i) to[i] = from[i * stride];
  }
}

// Item = (channel of x, row of x, block of the row), plane = sample. B = 0 stands for any block.
template <class T, int B>
__global__ void __launch_bounds__(kMaxThreads, 1)
    space_to_depth_kernel(const Map x, T* y, int planes, int any_block, bool aligned,
                          const ItemGrid grid) {
  int64_t sample;
  int item;
  if (!grid.locate(sample, item)) return;
  const int block = B > 0 ? B : any_block;
  const int out_width = int(x.w) / block, out_height = int(x.h) / block;
  const int j = item % out_width, h = item / out_width % int(x.h),
            channel = item / out_width / int(x.h);
  const int i = h / block, r = h % block;
  const T* in = static_cast<const T*>(x.data) + sample * x.stride_n + channel * x.stride_c +
                h * x.stride_h + int64_t(j) * block * x.stride_w;
  const int64_t out_size = int64_t(out_height) * out_width;
  T* out =
      y + (sample * block * block + r * block) * planes * out_size + int64_t(i) * out_width + j;

  if constexpr (B > 0) {
    T values[B];
    load_neighbours<T, B>(in, x.stride_w, aligned, values);
    for (int p = channel; p < planes; p += int(x.c)) {
#pragma unroll
      for (int q = 0; q < B; ++q) out[(int64_t(q) * planes + p) * out_size] = values[q];
    }
  } else {
    for (int q = 0; q < block; ++q) {
      for (int p = channel; p < planes; p += int(x.c)) {
        out[(int64_t(q) * planes + p) * out_size] = in[q * x.stride_w];
      }
    }
  }
}

// Item = (channel of x, row of x, block of the row), plane = sample.
template <class T, int B>
__global__ void __launch_bounds__(kMaxThreads, 1)
    depth_to_space_kernel(const Map y, T* x, int channels, int any_block, bool sum_copies,
                          int width_of_stores, const ItemGrid grid) {
  using A = accumulate_t<T>;
  int64_t sample;
  int item;
  if (!grid.locate(sample, item)) return;
  const int block = B > 0 ? B : any_block;
  const int planes = int(y.c) / (block * block), width = int(y.w), height = int(y.h) * block;
  const int j = item % width, h = item / width % height, channel = item / width / height;
  const int r = h % block, last = sum_copies ? planes : min(channel + 1, planes);
  const T* in =
      static_cast<const T*>(y.data) + sample * y.stride_n + h / block * y.stride_h + j * y.stride_w;
  T* out = x + (((sample * channels + channel) * height + h) * width + j) * block;

  const auto sum = [&](int q) {
    A total = channel < last ? widen(in[((r * block + q) * planes + channel) * y.stride_c]) : A(0);
    for (int p = channel + channels; p < last; p += channels) {
      total += widen(in[((r * block + q) * planes + p) * y.stride_c]);
    }
    return total;
  };
  if constexpr (B > 0) {
    A values[B];
#pragma unroll
    for (int q = 0; q < B; ++q) values[q] = sum(q);
    store_row(out, values, B, width_of_stores);
  } else {
    for (int q = 0; q < block; ++q) out[q] = narrow<T>(sum(q));
  }
}

// Calls f with the block as a constant, 0 for blocks without a kernel of their own.
template <class F>
void dispatch_block(int64_t block, const F& f) {
  switch (block) {
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

}  // namespace

void space_to_depth(Dtype dtype, const Map& x, void* y, int64_t planes, int64_t block,
                    Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    dispatch_block(block, [&](auto b) {
      constexpr int B = decltype(b)::value;
      constexpr int64_t bytes = sizeof(T) * (B == 0 ? 1 : B < kVector<T> ? B : kVector<T>);
      const auto divides = [&](int64_t stride) { return stride * int64_t(sizeof(T)) % bytes == 0; };
      const bool aligned = B > 0 && x.stride_w == 1 && divides(x.stride_h) && divides(x.stride_c) &&
                           divides(x.stride_n) && reinterpret_cast<uintptr_t>(x.data) % bytes == 0;
      const ItemGrid grid(x.n, x.c * x.h * (x.w / block));
      const auto kernel = space_to_depth_kernel<T, B>;
      REVK_LAUNCH(kernel, grid.blocks(), kMaxThreads, 0, stream, x, static_cast<T*>(y), int(planes),
                  int(block), aligned, grid);
    });
  });
}

void depth_to_space(Dtype dtype, const Map& y, void* x, int64_t channels, int64_t block,
                    bool sum_copies, Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    dispatch_block(block, [&](auto b) {
      constexpr int B = decltype(b)::value;
      const ItemGrid grid(y.n, channels * y.h * block * y.w);
      const auto kernel = depth_to_space_kernel<T, B>;
      REVK_LAUNCH(kernel, grid.blocks(), kMaxThreads, 0, stream, y, static_cast<T*>(x),
                  int(channels), int(block), sum_copies, store_width<T, (B > 0 ? B : 1)>(x, block),
                  grid);
    });
  });
}

}  // namespace revkernels::cuda
