// Transpose of the depthwise convolution in its input, by phases:
//
//   dx[n, c, h, w] = sum_{u, v} w[c, u, v] dy[n, c, (h + P - u) / S, (w + P - v) / S]
//   over the taps for which S divides both
//
// Input pixel h uses the taps u = (h + P) mod S + S m only, ceil(K / S)^2 taps in all instead of
// K^2 visited. A thread makes a cell of S x S inputs (S x 4 for S = 2): every phase occurs, each at
// a place known at compile time, each tap is used exactly once per cell, and cells store whole
// rows. Per input 1 / S^2 of an output is read, one value is written, 2 K^2 / S^2 FLOPs (at
// most 12.5) are done: bound by memory, by its writes. No atomics.
#include "depthwise.cuh"

namespace revkernels::cuda {
namespace {

template <int K, int S>
struct Cells {
  static constexpr int kPad = (K - 1) / 2;
  static constexpr int kWeightPitch = round_up(K, 4);
  static constexpr int kCells = S == 2 ? 2 : 1;  // along a row
  static constexpr int kCols = kCells * S;
  // Cell a reads the dy rows a - kBefore .. a + kAfter.
  static constexpr int kBefore = kPad / S, kAfter = (S - 1 + kPad) / S;
  static constexpr int kReach = kBefore + kAfter;

  static int tile_rows(int cells) { return cells + kReach; }
  static int tile_pitch(int cells) { return round_up(cells + kReach, 4); }
};

struct Arguments {
  TileSource dy;
  Filter filter;
  Output dx;
  int height, width;
  Cut cut;  // of cells
  TileShape tile;
  Divisor by_cols, by_rows;
  int store_width;
  bool add;
};

template <class T, int K, int S>
__global__ void __launch_bounds__(kMaxThreads, 1) depthwise_grad_input_kernel(const Arguments a) {
  using A = accumulate_t<T>;
  using C = Cells<K, S>;
  REVK_SHARED(shared);
  A* tile = reinterpret_cast<A*>(shared);
  A* weight = tile + a.tile.size();

  const int channels = int(a.dy.map.c);
  const Place place(a.cut, blockIdx.x, channels);
  load_weights<T, K, S>(a.filter, place.channel, place.planes, false, weight);
  load_tile<T>(a.dy, place.sample, place.channel, place.planes, place.row - C::kBefore,
               place.col - C::kBefore, a.tile, tile, Identity{});
  __syncthreads();

  const int items = place.planes * int(a.by_rows.divisor * a.by_cols.divisor);
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    int col = item;
    int row = a.by_cols.split(col);
    const int plane = a.by_rows.split(row);
    col *= C::kCells;
    const A* in = tile + (plane * a.tile.rows + row) * a.tile.pitch + col;
    const A* w = weight + plane * K * C::kWeightPitch;

    A window[C::kReach + 1][C::kReach + C::kCells];
#pragma unroll
    for (int i = 0; i <= C::kReach; ++i) {
#pragma unroll
      for (int j = 0; j < C::kReach + C::kCells; ++j) window[i][j] = in[i * a.tile.pitch + j];
    }

    const int h0 = (place.row + row) * S, w0 = (place.col + col) * S;
    T* dx = static_cast<T*>(a.dx.data) + place.sample * a.dx.stride_n +
            (place.channel + plane) * a.dx.stride_c + int64_t(h0) * a.width + w0;
#pragma unroll
    for (int t = 0; t < S; ++t) {  // row h0 + t
      A sum[C::kCols] = {};
#pragma unroll
      for (int u = 0; u < K; ++u) {
        if ((t + C::kPad - u) % S != 0) continue;
        const int i = (t + C::kPad - u) / S + C::kBefore;
        A taps[C::kWeightPitch];
        load_sums<C::kWeightPitch, 4>(w + u * C::kWeightPitch, taps);
#pragma unroll
        for (int v = 0; v < K; ++v) {
#pragma unroll
          for (int q = 0; q < C::kCols; ++q) {
            const int shift = q % S + C::kPad - v;
            if (shift % S == 0) sum[q] += taps[v] * window[i][q / S + shift / S + C::kBefore];
          }
        }
      }
      if (h0 + t >= a.height) continue;
      store_row(dx + int64_t(t) * a.width, sum, a.width - w0, a.store_width, a.add);
    }
  }
}

// Any odd size, any stride, one input per thread straight from global memory.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    depthwise_grad_input_any_kernel(const Map dy, const Filter filter, const Output dx, int width,
                                    bool add, const ItemGrid grid) {
  using A = accumulate_t<T>;
  int64_t plane;
  int item;
  if (!grid.locate(plane, item)) return;
  const int64_t sample = plane / dy.c, channel = plane % dy.c, k = filter.size, s = filter.stride;
  const T* in = static_cast<const T*>(dy.data) + sample * dy.stride_n + channel * dy.stride_c;
  const PhaseTaps rows = depthwise_phase(item / width, k, s);
  const PhaseTaps cols = depthwise_phase(item % width, k, s);

  A sum = 0;
  for (int64_t m = 0; m < rows.count; ++m) {
    const int64_t i = rows.output - m;
    if (i < 0 || i >= dy.h) continue;
    for (int64_t l = 0; l < cols.count; ++l) {
      const int64_t j = cols.output - l;
      if (j < 0 || j >= dy.w) continue;
      const int64_t tap = (channel * k + rows.tap + m * s) * k + cols.tap + l * s;
      sum += load_wide<T>(filter.weight, filter.wide, tap) *
             widen(in[i * dy.stride_h + j * dy.stride_w]);
    }
  }
  T* to = static_cast<T*>(dx.data) + sample * dx.stride_n + channel * dx.stride_c + item;
  *to = narrow<T>(add ? widen(*to) + sum : sum);
}

template <class T, int K, int S>
void launch(const Map& dy, const Filter& filter, const Output& dx, int64_t height, int64_t width,
            bool add, Stream stream) {
  if constexpr (S > 1) {
    using A = accumulate_t<T>;
    using C = Cells<K, S>;
    const auto bytes = [](int rows, int cols) {
      return (int64_t(C::tile_rows(rows)) * C::tile_pitch(cols) + K * C::kWeightPitch) *
             int64_t(sizeof(A));
    };
    const Cut cut =
        cut_map(dy.c, ceil_div(height, S), ceil_div(width, S), 1, C::kCells, kMaxThreads, bytes);
    const int item_cols = cut.cols / C::kCells;
    const Arguments arguments{
        TileSource(dy),
        filter,
        dx,
        int(height),
        int(width),
        cut,
        TileShape(cut.planes, C::tile_rows(cut.rows), C::tile_pitch(cut.cols)),
        Divisor(item_cols),
        Divisor(cut.rows),
        store_width<T, C::kCols>(dx, width),
        add};
    const int threads = threads_for(int64_t(cut.planes) * cut.rows * item_cols);
    const auto kernel = depthwise_grad_input_kernel<T, K, S>;
    REVK_LAUNCH(kernel, unsigned(cut.blocks(dy.n)), threads, cut.planes * bytes(cut.rows, cut.cols),
                stream, arguments);
  }
}

template <class T>
void launch_any(const Map& dy, const Filter& filter, const Output& dx, int64_t height,
                int64_t width, bool add, Stream stream) {
  const ItemGrid grid(dy.n * dy.c, height * width);
  const auto kernel = depthwise_grad_input_any_kernel<T>;
  REVK_LAUNCH(kernel, grid.blocks(), kMaxThreads, 0, stream, dy, filter, dx, int(width), add, grid);
}

}  // namespace

void depthwise_conv_grad_input(Dtype dtype, const Map& dy, const Filter& filter, const Output& dx,
                               int64_t height, int64_t width, bool add, Stream stream) {
  if (filter.stride == 1 && (filter.size == 3 || filter.size == 5)) {
    return depthwise_conv_flipped(dtype, dy, filter, dx, add, stream);
  }
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool tiled = dispatch_depthwise(filter.size, filter.stride, [&](auto k, auto s) {
      launch<T, decltype(k)::value, decltype(s)::value>(dy, filter, dx, height, width, add, stream);
    });
    if (!tiled) launch_any<T>(dy, filter, dx, height, width, add, stream);
  });
}

}  // namespace revkernels::cuda
