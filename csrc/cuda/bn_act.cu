// BatchNorm's affine map, activation and squeeze-excite's product:
//
//   z = gate h(u),  u = scale x + shift
//
// Per value: one read, one write, 8 FLOPs: bound by memory. 16 bytes per thread where
// alignment allows that. A value depends on its own inputs alone, in formulas that no compiler
// contracts: the same bits in any chunk and layout.
#include "walk.cuh"

namespace revkernels::cuda {
namespace {

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
                      entry<A>(norm.gate, plane_gate(norm, plane, c, walk.channels), A(1))};
  };
  walk.for_each<V>(spot, read, [&](int i, const Forward<A>& k) {
    out[i] = k.gate * activate(multiply_add(k.scale, widen(in[i]), k.shift), norm.act);
  });
  walk.store<T>(z, spot, out);
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

}  // namespace revkernels::cuda
