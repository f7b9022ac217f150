// Partial sums, and what makes the parts of a sum equally long.
#include "walk.cuh"

namespace revkernels::cuda {
namespace {

template <class A>
__global__ void __launch_bounds__(kMaxThreads)
    fold_parts_kernel(const A* partial, int64_t parts, int64_t rows, int64_t size, A* out,
                      int64_t stride, bool add) {
  const int64_t i = int64_t(blockIdx.x) * kMaxThreads + threadIdx.x;
  if (i >= rows * size) return;
  const int64_t row = i / size;
  A* to = out + row * stride + (i - row * size);
  A sum = add ? *to : A(0);
#pragma unroll 4
  for (int64_t s = 0; s < parts; ++s) sum += partial[s * rows * size + i];
  *to = sum;
}

// rows[r, begin .. pitch) = 0
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    zero_tails_kernel(T* rows, int64_t count, int64_t pitch, int64_t begin) {
  const int64_t i = int64_t(blockIdx.x) * kMaxThreads + threadIdx.x, width = pitch - begin;
  const int64_t row = i / width;
  if (row < count) rows[row * pitch + begin + (i - row * width)] = T{};
}

}  // namespace

void fold_parts(Dtype dtype, const void* partial, int64_t parts, int64_t rows, int64_t size,
                void* out, int64_t stride, bool add, Stream stream) {
  const unsigned blocks = unsigned(ceil_div(rows * size, kMaxThreads));
  const auto launch = [&](auto sum) {
    using A = decltype(sum);
    const auto kernel = fold_parts_kernel<A>;
    REVK_LAUNCH(kernel, blocks, kMaxThreads, 0, stream, static_cast<const A*>(partial), parts, rows,
                size, static_cast<A*>(out), stride, add);
  };
  dispatch_sums(dtype, launch);
}

void zero_tails(Dtype dtype, void* rows, int64_t count, int64_t pitch, int64_t begin,
                Stream stream) {
  if (begin == pitch) return;
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = zero_tails_kernel<T>;
    REVK_LAUNCH(kernel, unsigned(ceil_div(count * (pitch - begin), kMaxThreads)), kMaxThreads, 0,
                stream, static_cast<T*>(rows), count, pitch, begin);
  });
}

}  // namespace revkernels::cuda
