// A map in another type: y <- factor x, or y <- y + factor x. Values of an int16 stream, casts of
// autocast, and gradients that are added up. Per value one or two reads, one write: bound by
// memory.
#include "walk.cuh"

namespace revkernels::cuda {
namespace {

template <class X>
__device__ __forceinline__ auto value_of(X x) {
  return widen(x);
}
__device__ __forceinline__ float value_of(int16_t x) { return float(x); }

template <class Y, class X, int V>
__global__ void __launch_bounds__(kMaxThreads)
    convert_kernel(const Walk walk, const Map x, const Map y, accumulate_t<Y> factor, bool add) {
  using A = accumulate_t<Y>;
  Spot spot;
  if (!walk.locate<V>(spot)) return;
  X in[V];
  walk.load(x, spot, in);
  A out[V];
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = A(value_of(in[i])) * factor;
  if (add) {
    Y onto[V];
    walk.load(y, spot, onto);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] += widen(onto[i]);
  }
  walk.store<Y>(y, spot, out);
}

template <class Y, class X>
void launch(const Map& x, const Map& y, double factor, bool add, Stream stream) {
  constexpr int V = 16 / (sizeof(X) > sizeof(Y) ? sizeof(X) : sizeof(Y));
  const Walk walk({x, y}, {int(sizeof(X)), int(sizeof(Y))}, V);
  dispatch_vector<V>(walk, [&](auto v) {
    const auto kernel = convert_kernel<Y, X, decltype(v)::value>;
    REVK_LAUNCH(kernel, walk.grid.blocks(), kMaxThreads, 0, stream, walk, x, y,
                accumulate_t<Y>(factor), add);
  });
}

}  // namespace

bool converts(Dtype from, Dtype to) {
  const auto is_short = [](Dtype d) { return d == Dtype::float16 || d == Dtype::bfloat16; };
  return from == to || from == Dtype::int16 || (from == Dtype::float32 && is_short(to)) ||
         (is_short(from) && to == Dtype::float32);
}

void convert(Dtype from, const Map& x, Dtype to, const Map& y, double factor, bool add,
             Stream stream) {
  dispatch(to, [&](auto tag) {
    using Y = decltype(tag);
    if (from == Dtype::int16) return launch<Y, int16_t>(x, y, factor, add, stream);
    if (from == to) return launch<Y, Y>(x, y, factor, add, stream);
    if constexpr (sizeof(Y) == 2) launch<Y, float>(x, y, factor, add, stream);
    if constexpr (std::is_same_v<Y, float>) {
      if (from == Dtype::float16) launch<Y, float16>(x, y, factor, add, stream);
      if (from == Dtype::bfloat16) launch<Y, bfloat16>(x, y, factor, add, stream);
    }
  });
}

}  // namespace revkernels::cuda
