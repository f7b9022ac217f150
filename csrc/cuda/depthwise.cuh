// What the depthwise kernels share: kernel size K, padding P = (K - 1) / 2, stride S.
#pragma once

#include "tile.cuh"

namespace revkernels::cuda {

template <int N>
using Constant = std::integral_constant<int, N>;

// The kernels of the network; every other size and stride takes the kernels named *_any.
template <class F>
bool dispatch_depthwise(int64_t kernel, int64_t stride, const F& f) {
  const auto is = [&](int64_t k, int64_t s) { return kernel == k && stride == s; };
  if (is(3, 1)) return f(Constant<3>{}, Constant<1>{}), true;
  if (is(5, 1)) return f(Constant<5>{}, Constant<1>{}), true;
  if (is(3, 2)) return f(Constant<3>{}, Constant<2>{}), true;
  if (is(5, 2)) return f(Constant<5>{}, Constant<2>{}), true;
  if (is(7, 4)) return f(Constant<7>{}, Constant<4>{}), true;
  if (is(15, 8)) return f(Constant<15>{}, Constant<8>{}), true;
  return false;
}

template <int K, int S>
struct Depthwise {
  static constexpr int kPad = (K - 1) / 2;
  static constexpr int kWeightPitch = round_up(K, 4);
  // A thread's patch of outputs: stride 1 gains by reuse of the window, larger ones by parallelism.
  static constexpr int kRows = S == 1 ? 4 : (K <= 5 ? 2 : 1);
  static constexpr int kCols = kRows;
  // Inputs that a patch reads: kInRows rows of kWindow columns, of which the last may go unused.
  static constexpr int kInRows = (kRows - 1) * S + K;
  static constexpr int kWindow = round_up((kCols - 1) * S + K, 4);
  static_assert(kCols * S % 4 == 0, "windows start at multiples of four values");

  // The input tile of rows x cols outputs.
  static int tile_rows(int rows) { return (rows - 1) * S + K; }
  static int tile_pitch(int cols) { return (cols - kCols) * S + kWindow; }
};

// weight[plane][u][v] in shared memory, rows padded to kWeightPitch; `flip` turns both axes round.
template <class T, int K, int S>
__device__ __forceinline__ void load_weights(const Filter& filter, int channel, int planes,
                                             bool flip, accumulate_t<T>* weight) {
  constexpr int kPitch = Depthwise<K, S>::kWeightPitch;
  for (int i = threadIdx.x; i < planes * K * kPitch; i += blockDim.x) {
    const int v = i % kPitch, row = i / kPitch;
    const int plane = row / K, u = row % K;
    const int tap = flip ? K * K - 1 - (u * K + v) : u * K + v;
    weight[i] =
        v < K ? load_wide<T>(filter.weight, filter.wide, int64_t(channel + plane) * K * K + tap)
              : accumulate_t<T>(0);
  }
}

// The convolution with both axes of the weights turned round: its own transpose at stride 1. K is 3
// or 5. With `add` added to dx.
void depthwise_conv_flipped(Dtype dtype, const Map& dy, const Filter& filter, const Output& dx,
                            bool add, Stream stream);

}  // namespace revkernels::cuda
