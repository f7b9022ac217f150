// Depthwise convolution with an optional prologue:
//
//   y[n, c, i, j] = sum_{u, v} w[c, u, v] z[n, c, S i + u - P, S j + v - P]
//   z = x, or hardswish(a_c x + b_c)
//
// Per output S^2 inputs are read once, one output is written and 2 K^2 FLOPs are done: bound by
// memory, except 16-bit maps with K = 5, S = 1 (50 FLOPs for 4 bytes), which are about even. The
// tile holds z, so the prologue is done once per input and the zero padding applies to z. Every
// output is summed in the order of (u, v), whatever the batch, the layout and the tile: results are
// reproducible bit by bit.
//
// At stride 1 the same kernel with turned weights is the transpose in x, see
// depthwise_conv_grad_input.
#include "depthwise.cuh"

namespace revkernels::cuda {
namespace {

struct Arguments {
  TileSource x;
  Filter filter;
  Affine prologue;
  Output y;
  int out_height, out_width;
  Cut cut;
  TileShape tile;
  Divisor by_cols, by_rows;  // patches per row and per column of a tile
  int store_width;
  bool flip, add;
};

template <class T, int K, int S>
__global__ void __launch_bounds__(kMaxThreads, 1) depthwise_conv_kernel(const Arguments a) {
  using A = accumulate_t<T>;
  using D = Depthwise<K, S>;
  REVK_SHARED(shared);
  A* tile = reinterpret_cast<A*>(shared);
  A* weight = tile + a.tile.size();
  A* scale = weight + a.cut.planes * K * D::kWeightPitch;
  A* shift = scale + a.cut.planes;

  const int channels = int(a.x.map.c);
  const Place place(a.cut, blockIdx.x, channels);
  load_weights<T, K, S>(a.filter, place.channel, place.planes, a.flip, weight);
  const int row0 = place.row * S - D::kPad, col0 = place.col * S - D::kPad;
  if (a.prologue.scale != nullptr) {
    for (int i = threadIdx.x; i < place.planes; i += blockDim.x) {
      scale[i] = static_cast<const A*>(a.prologue.scale)[place.channel + i];
      shift[i] = static_cast<const A*>(a.prologue.shift)[place.channel + i];
    }
    __syncthreads();
    load_tile<T>(a.x, place.sample, place.channel, place.planes, row0, col0, a.tile, tile,
                 Prologue<A>{scale, shift});
  } else {
    load_tile<T>(a.x, place.sample, place.channel, place.planes, row0, col0, a.tile, tile,
                 Identity{});
  }
  __syncthreads();

  const int patches = place.planes * int(a.by_rows.divisor * a.by_cols.divisor);
  for (int patch = threadIdx.x; patch < patches; patch += blockDim.x) {
    int col = patch;
    int row = a.by_cols.split(col);
    const int plane = a.by_rows.split(row);
    row *= D::kRows;
    col *= D::kCols;
    const A* in = tile + (plane * a.tile.rows + row * S) * a.tile.pitch + col * S;
    const A* w = weight + plane * K * D::kWeightPitch;

    A sum[D::kRows][D::kCols] = {};
    if constexpr (K <= 5) {
      A taps[K][D::kWeightPitch];
#pragma unroll
      for (int u = 0; u < K; ++u) load_sums<D::kWeightPitch, 4>(w + u * D::kWeightPitch, taps[u]);
#pragma unroll
      for (int i = 0; i < D::kInRows; ++i) {
        A window[D::kWindow];
        load_sums<D::kWindow, 4>(in + i * a.tile.pitch, window);
#pragma unroll
        for (int r = 0; r < D::kRows; ++r) {
          const int u = i - r * S;
          if (u < 0 || u >= K) continue;
#pragma unroll
          for (int v = 0; v < K; ++v) {
#pragma unroll
            for (int q = 0; q < D::kCols; ++q) sum[r][q] += taps[u][v] * window[q * S + v];
          }
        }
      }
    } else {
      // Too many taps for registers: rows come from shared memory, as broadcasts to a warp.
      static_assert(D::kRows == 1 && D::kCols == 1);
#pragma unroll 1
      for (int u = 0; u < K; ++u) {
        A window[D::kWindow], taps[D::kWeightPitch];
        load_sums<D::kWindow, 4>(in + u * a.tile.pitch, window);
        load_sums<D::kWeightPitch, 4>(w + u * D::kWeightPitch, taps);
#pragma unroll
        for (int v = 0; v < K; ++v) sum[0][0] += taps[v] * window[v];
      }
    }

    T* y = static_cast<T*>(a.y.data) + place.sample * a.y.stride_n +
           (place.channel + plane) * a.y.stride_c + (place.row + row) * a.out_width + place.col +
           col;
    const int count = a.out_width - place.col - col;
#pragma unroll
    for (int r = 0; r < D::kRows; ++r) {
      if (place.row + row + r >= a.out_height) break;
      store_row(y + int64_t(r) * a.out_width, sum[r], count, a.store_width, a.add);
    }
  }
}

// Any odd size, any stride, one output per thread straight from global memory: K^2 reads per
// output, most of them from the cache.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    depthwise_conv_any_kernel(const Map x, const Filter filter, const Affine prologue, T* y,
                              int out_width, const ItemGrid grid) {
  using A = accumulate_t<T>;
  int64_t plane;
  int item;
  if (!grid.locate(plane, item)) return;
  const int k = int(filter.size), pad = (k - 1) / 2;
  const int64_t sample = plane / x.c, channel = plane % x.c;
  const int64_t row0 = int64_t(item / out_width) * filter.stride - pad;
  const int64_t col0 = int64_t(item % out_width) * filter.stride - pad;
  const T* in = static_cast<const T*>(x.data) + sample * x.stride_n + channel * x.stride_c;
  const bool activated = prologue.scale != nullptr;
  const A scale = activated ? static_cast<const A*>(prologue.scale)[channel] : A(1);
  const A shift = activated ? static_cast<const A*>(prologue.shift)[channel] : A(0);

  A sum = 0;
  for (int u = 0; u < k; ++u) {
    const int64_t row = row0 + u;
    if (row < 0 || row >= x.h) continue;
    for (int v = 0; v < k; ++v) {
      const int64_t col = col0 + v;
      if (col < 0 || col >= x.w) continue;
      const A value = widen(in[row * x.stride_h + col * x.stride_w]);
      const A tap = load_wide<T>(filter.weight, filter.wide, (channel * k + u) * k + v);
      sum += tap * (activated ? hardswish(scale * value + shift) : value);
    }
  }
  y[plane * grid.items + item] = narrow<T>(sum);
}

template <class T, int K, int S>
void launch(const Map& x, const Filter& filter, const Affine& prologue, const Output& y, bool flip,
            bool add, Stream stream) {
  using A = accumulate_t<T>;
  using D = Depthwise<K, S>;
  const int64_t height = ceil_div(x.h, S), width = ceil_div(x.w, S);
  constexpr int kPlaneExtra = K * D::kWeightPitch + 2;  // weights, scale and shift
  const auto bytes = [](int rows, int cols) {
    return (int64_t(D::tile_rows(rows)) * D::tile_pitch(cols) + kPlaneExtra) * int64_t(sizeof(A));
  };
  const Cut cut = cut_map(x.c, height, width, D::kRows, D::kCols, 192, bytes);
  const int patch_rows = cut.rows / D::kRows, patch_cols = cut.cols / D::kCols;
  const Arguments arguments{TileSource(x),
                            filter,
                            prologue,
                            y,
                            int(height),
                            int(width),
                            cut,
                            TileShape(cut.planes, D::tile_rows(cut.rows), D::tile_pitch(cut.cols)),
                            Divisor(patch_cols),
                            Divisor(patch_rows),
                            store_width<T, D::kCols>(y, width),
                            flip,
                            add};
  const int threads = threads_for(int64_t(cut.planes) * patch_rows * patch_cols);
  const auto kernel = depthwise_conv_kernel<T, K, S>;
  REVK_LAUNCH(kernel, unsigned(cut.blocks(x.n)), threads, cut.planes * bytes(cut.rows, cut.cols),
              stream, arguments);
}

template <class T>
void launch_any(const Map& x, const Filter& filter, const Affine& prologue, void* y,
                Stream stream) {
  const int64_t height = ceil_div(x.h, filter.stride), width = ceil_div(x.w, filter.stride);
  const ItemGrid grid(x.n * x.c, height * width);
  const auto kernel = depthwise_conv_any_kernel<T>;
  REVK_LAUNCH(kernel, grid.blocks(), kMaxThreads, 0, stream, x, filter, prologue,
              static_cast<T*>(y), int(width), grid);
}

}  // namespace

void depthwise_conv(Dtype dtype, const Map& x, const Filter& filter, const Affine& prologue,
                    void* y, Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool tiled = dispatch_depthwise(filter.size, filter.stride, [&](auto k, auto s) {
      constexpr int K = decltype(k)::value, S = decltype(s)::value;
      const int64_t pixels = ceil_div(x.h, S) * ceil_div(x.w, S);
      launch<T, K, S>(x, filter, prologue, {y, x.c * pixels, pixels}, false, false, stream);
    });
    if (!tiled) launch_any<T>(x, filter, prologue, y, stream);
  });
}

void depthwise_conv_flipped(Dtype dtype, const Map& dy, const Filter& filter, const Output& dx,
                            bool add, Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (filter.size == 3) launch<T, 3, 1>(dy, filter, {nullptr, nullptr}, dx, true, add, stream);
    if (filter.size == 5) launch<T, 5, 1>(dy, filter, {nullptr, nullptr}, dx, true, add, stream);
  });
}

}  // namespace revkernels::cuda
