// BatchNorm's affine map, activation and squeeze-excite's product, and the gradient of that:
//
//   z  = gate h(u),  u = scale x + shift
//   dx = scale (gate dz + dpool) h'(u) + slope x + offset
//
// Per value: one or two reads, one write, 8 or 12 FLOPs: bound by memory. 16 bytes per thread where
// alignment allows that. A value depends on its own inputs alone, in formulas that no compiler
// contracts: the same bits in any chunk and layout.
#include "walk.cuh"

namespace revkernels::cuda {
namespace {

// Where a plane's gate lies: [N, C] without gaps unless the norm says otherwise.
__device__ __forceinline__ int64_t plane_gate(const Norm& norm, int64_t plane, int c,
                                              const Walk& walk) {
  if (norm.gate_stride_n == 0) return plane;
  return (plane - c) / walk.channels * norm.gate_stride_n + c * norm.gate_stride_c;
}

template <class A>
struct Forward {
  A scale, shift, gate;
};

template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads)
    bn_act_kernel(const Walk walk, const Map x, const Map z, const Norm norm) {
  using A = accumulate_t<T>;
  Spot spot;
  if (!walk.locate<V>(spot)) return;
  T in[V];
  walk.load(x, spot, in);
  A out[V];
  const auto read = [&](int64_t plane, int c) {
    return Forward<A>{entry<A>(norm.scale, c, A(1)), entry<A>(norm.shift, c, A(0)),
                      entry<A>(norm.gate, plane_gate(norm, plane, c, walk), A(1))};
  };
  walk.for_each<V>(spot, read, [&](int i, const Forward<A>& k) {
    out[i] = k.gate * activate(multiply_add(k.scale, widen(in[i]), k.shift), norm.act);
  });
  walk.store<T>(z, spot, out);
}

template <class A>
struct Backward {
  A scale, shift, gate, dpool, slope, offset;
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
                       entry<A>(norm.gate, plane_gate(norm, plane, c, walk), A(1)),
                       entry<A>(grad.dpool, plane, A(0)),
                       entry<A>(grad.slope, c, A(0)),
                       entry<A>(grad.offset, c, A(0))};
  };
  walk.for_each<V>(spot, read, [&](int i, const Backward<A>& k) {
    const A value = widen(in[i]);
    const A slope = activation_slope(multiply_add(k.scale, value, k.shift), norm.act);
    const A g = multiply_add(k.gate, widen(din[i]), k.dpool) * slope;
    out[i] = multiply_add(k.scale, g, multiply_add(k.slope, value, k.offset));
  });
  walk.store<T>(dx, spot, out);
}

}  // namespace

void bn_act(Dtype dtype, const Map& x, const Norm& norm, const Output& z, Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kBytes = sizeof(T);
    const Map out = map_of(z, x);
    const Walk walk({x, out}, {kBytes, kBytes}, kVector<T>);
    dispatch_vector<kVector<T>>(walk, [&](auto v) {
      const auto kernel = bn_act_kernel<T, decltype(v)::value>;
      REVK_LAUNCH(kernel, walk.grid.blocks(), kMaxThreads, 0, stream, walk, x, out, norm);
    });
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

}  // namespace revkernels::cuda
