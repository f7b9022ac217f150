// Upsampling by F and its transpose.
//
//   y[n, c, F h + t, F w + q] = sum over the (at most 2 x 2) sources of x, with common.h's weights
//   dx[n, c, h, w] = sum over the outputs that read it, the same weights
//
// For F in {2, 4, 8} the weights depend on the phases t, q only, which are known at compile time;
// at the borders indices are clamped. Both read and write every value once and do at most about 6
// FLOPs per fine value: bound by memory.
#include "tile.cuh"

namespace revkernels::cuda {
namespace {

// --- forward ----------------------------------------------------------------------------------

// A thread makes F rows of kCols outputs out of 3 x (kCells + 2) inputs (nearest: 1 x kCells).
template <class T, int F, Upsampling M>
__global__ void __launch_bounds__(kMaxThreads, 1)
    upsample_kernel(const Map x, T* y, int cells_per_row, int width_of_stores,
                    const ItemGrid grid) {
  using A = accumulate_t<T>;
  constexpr int kCols = F > kVector<T> ? F : kVector<T>, kCells = kCols / F;
  constexpr int kHalo = M == Upsampling::bilinear ? 1 : 0;
  int64_t plane;
  int item;
  if (!grid.locate(plane, item)) return;
  const int height = int(x.h), width = int(x.w);
  const int h = item / cells_per_row, w = item % cells_per_row * kCells;
  const T* in = static_cast<const T*>(x.data) + plane / x.c * x.stride_n + plane % x.c * x.stride_c;

  A near[1 + 2 * kHalo][kCells + 2 * kHalo];
#pragma unroll
  for (int i = 0; i < 1 + 2 * kHalo; ++i) {
#pragma unroll
    for (int j = 0; j < kCells + 2 * kHalo; ++j) {
      const int row = min(max(h + i - kHalo, 0), height - 1),
                col = min(max(w + j - kHalo, 0), width - 1);
      near[i][j] = widen(in[row * x.stride_h + col * x.stride_w]);
    }
  }

  const int out_width = F * width;
  T* out = y + (plane * height + h) * F * out_width + w * F;
#pragma unroll
  for (int t = 0; t < F; ++t) {
    // Phase t within the middle one of three inputs.
    const Lerp<A> rows = upsample_source<A>(F + t, F, 3, M);
    A blend[kCells + 2 * kHalo];
#pragma unroll
    for (int j = 0; j < kCells + 2 * kHalo; ++j) {
      blend[j] = kHalo == 0 ? near[0][j] : rows.w0 * near[rows.i0][j] + rows.w1 * near[rows.i1][j];
    }
    A line[kCols];
#pragma unroll
    for (int q = 0; q < kCols; ++q) {
      const Lerp<A> cols = upsample_source<A>(F + q % F, F, 3, M);
      line[q] = kHalo == 0 ? blend[q / F]
                           : cols.w0 * blend[q / F + cols.i0] + cols.w1 * blend[q / F + cols.i1];
    }
    store_row(out + int64_t(t) * out_width, line, out_width - w * F, width_of_stores);
  }
}

// Any factor, one output per thread.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    upsample_any_kernel(const Map x, T* y, int64_t factor, Upsampling mode, const ItemGrid grid) {
  using A = accumulate_t<T>;
  int64_t plane;
  int item;
  if (!grid.locate(plane, item)) return;
  const int64_t out_width = factor * x.w;
  const Lerp<A> rows = upsample_source<A>(item / out_width, factor, x.h, mode);
  const Lerp<A> cols = upsample_source<A>(item % out_width, factor, x.w, mode);
  const T* in = static_cast<const T*>(x.data) + plane / x.c * x.stride_n + plane % x.c * x.stride_c;
  const auto at = [&](int64_t i, int64_t j) { return widen(in[i * x.stride_h + j * x.stride_w]); };
  const A value = rows.w0 * (cols.w0 * at(rows.i0, cols.i0) + cols.w1 * at(rows.i0, cols.i1)) +
                  rows.w1 * (cols.w0 * at(rows.i1, cols.i0) + cols.w1 * at(rows.i1, cols.i1));
  y[plane * grid.items + item] = narrow<T>(value);
}

// --- adjoint ----------------------------------------------------------------------------------

// The weights are separable: rows are summed first, into shared memory, then columns.
template <int F, Upsampling M>
struct Adjoint {
  static constexpr int kPad = M == Upsampling::bilinear ? F / 2 : 0;
  static constexpr int kTaps = F + 2 * kPad;

  static int tile_rows(int rows) { return (rows - 1) * F + kTaps; }
  static int tile_pitch(int cols) { return round_up((cols - 1) * F + kTaps, 4); }

  // sum_t weight(t) value(t): output F j - kPad + t reads input j with common.h's weight, and with
  // weight 1 where the border clamps both of its sources to j. Outputs outside the map are zeros.
  template <class A, class Value>
  static __device__ __forceinline__ A sum(int j, int size, const Value& value) {
    A total = 0;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const A inner = adjoint_weight<A>(F + t - kPad, 1, F, 3, M);
      const bool clamped = t < kTaps / 2 ? j == 0 : j == size - 1;
      total += (kPad > 0 && clamped ? A(1) : inner) * value(t);
    }
    return total;
  }
};

struct AdjointArguments {
  TileSource dy;
  void* dx;
  int height, width;
  Cut cut;
  TileShape tile;
  Divisor by_cols, by_rows;
};

template <class T, int F, Upsampling M>
__global__ void __launch_bounds__(kMaxThreads, 1)
    upsample_adjoint_kernel(const AdjointArguments a) {
  using A = accumulate_t<T>;
  using D = Adjoint<F, M>;
  REVK_SHARED(shared);
  A* tile = reinterpret_cast<A*>(shared);
  A* row_sums = tile + a.tile.size();  // [planes, tile rows, cols]

  const int channels = int(a.dy.map.c), cols = a.cut.cols;
  const Place place(a.cut, blockIdx.x, channels);
  load_tile<T>(a.dy, place.sample, place.channel, place.planes, place.row * F - D::kPad,
               place.col * F - D::kPad, a.tile, tile, Identity{});
  __syncthreads();

  for (int i = threadIdx.x; i < place.planes * a.tile.rows * cols; i += blockDim.x) {
    int col = i;
    const int row = a.by_cols.split(col);
    const A* from = tile + row * a.tile.pitch + col * F;
    row_sums[i] = D::template sum<A>(place.col + col, a.width, [&](int t) { return from[t]; });
  }
  __syncthreads();

  for (int i = threadIdx.x; i < place.planes * a.cut.rows * cols; i += blockDim.x) {
    int col = i;
    int row = a.by_cols.split(col);
    const int plane = a.by_rows.split(row);
    if (place.row + row >= a.height || place.col + col >= a.width) continue;
    const A* from = row_sums + (plane * a.tile.rows + row * F) * cols + col;
    const A value =
        D::template sum<A>(place.row + row, a.height, [&](int t) { return from[t * cols]; });
    const int64_t out_plane = place.sample * channels + place.channel + plane;
    T* dx = static_cast<T*>(a.dx);
    dx[(out_plane * a.height + place.row + row) * a.width + place.col + col] = narrow<T>(value);
  }
}

// Any factor, one input per thread, gathering its window.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    upsample_adjoint_any_kernel(const Map dy, T* dx, int64_t factor, Upsampling mode,
                                const ItemGrid grid) {
  using A = accumulate_t<T>;
  int64_t plane;
  int item;
  if (!grid.locate(plane, item)) return;
  const int64_t height = dy.h / factor, width = dy.w / factor;
  const int64_t h = item / width, w = item % width;
  const Window rows = adjoint_window(h, factor, height, mode),
               cols = adjoint_window(w, factor, width, mode);
  const T* in =
      static_cast<const T*>(dy.data) + plane / dy.c * dy.stride_n + plane % dy.c * dy.stride_c;
  A total = 0;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    A row_sum = 0;
    for (int64_t j = cols.begin; j < cols.end; ++j) {
      row_sum += adjoint_weight<A>(j, w, factor, width, mode) *
                 widen(in[i * dy.stride_h + j * dy.stride_w]);
    }
    total += adjoint_weight<A>(i, h, factor, height, mode) * row_sum;
  }
  dx[plane * grid.items + item] = narrow<T>(total);
}

// --- launches ---------------------------------------------------------------------------------

template <class T, int F, Upsampling M>
void launch(const Map& x, void* y, Stream stream) {
  constexpr int kCols = F > kVector<T> ? F : kVector<T>;
  const int cells_per_row = int(ceil_div(x.w * F, kCols));
  const ItemGrid grid(x.n * x.c, x.h * cells_per_row);
  const auto kernel = upsample_kernel<T, F, M>;
  REVK_LAUNCH(kernel, grid.blocks(), kMaxThreads, 0, stream, x, static_cast<T*>(y), cells_per_row,
              store_width<T, kCols>(y, x.w * F), grid);
}

template <class T, int F, Upsampling M>
void launch_adjoint(const Map& dy, void* dx, Stream stream) {
  using A = accumulate_t<T>;
  using D = Adjoint<F, M>;
  const int64_t height = dy.h / F, width = dy.w / F;
  const auto bytes = [](int rows, int cols) {
    return int64_t(D::tile_rows(rows)) * (D::tile_pitch(cols) + cols) * int64_t(sizeof(A));
  };
  const Cut cut = cut_map(dy.c, height, width, 1, 1, 128, bytes);
  const TileShape tile(cut.planes, D::tile_rows(cut.rows), D::tile_pitch(cut.cols));
  const AdjointArguments arguments{
      TileSource(dy), dx, int(height), int(width), cut, tile, Divisor(cut.cols), Divisor(cut.rows)};
  const int threads = threads_for(int64_t(cut.planes) * cut.rows * cut.cols);
  const auto kernel = upsample_adjoint_kernel<T, F, M>;
  REVK_LAUNCH(kernel, unsigned(cut.blocks(dy.n)), threads, cut.planes * bytes(cut.rows, cut.cols),
              stream, arguments);
}

// Calls f with the factor and the mode as constants; false for factors without a kernel of their
// own.
template <class F>
bool dispatch_upsampling(int64_t factor, Upsampling mode, const F& f) {
  const auto with_mode = [&](auto constant) {
    using Bilinear = std::integral_constant<Upsampling, Upsampling::bilinear>;
    using Nearest = std::integral_constant<Upsampling, Upsampling::nearest>;
    mode == Upsampling::bilinear ? f(constant, Bilinear{}) : f(constant, Nearest{});
  };
  switch (factor) {
    case 2:
      return with_mode(std::integral_constant<int, 2>{}), true;
    case 4:
      return with_mode(std::integral_constant<int, 4>{}), true;
    case 8:
      return with_mode(std::integral_constant<int, 8>{}), true;
    default:
      return false;
  }
}

}  // namespace

void upsample(Dtype dtype, const Map& x, void* y, int64_t factor, Upsampling mode, Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool done = dispatch_upsampling(factor, mode, [&](auto f, auto m) {
      launch<T, decltype(f)::value, decltype(m)::value>(x, y, stream);
    });
    if (done) return;
    const ItemGrid grid(x.n * x.c, x.h * x.w * factor * factor);
    const auto kernel = upsample_any_kernel<T>;
    REVK_LAUNCH(kernel, grid.blocks(), kMaxThreads, 0, stream, x, static_cast<T*>(y), factor, mode,
                grid);
  });
}

void upsample_adjoint(Dtype dtype, const Map& dy, void* dx, int64_t factor, Upsampling mode,
                      Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool done = dispatch_upsampling(factor, mode, [&](auto f, auto m) {
      launch_adjoint<T, decltype(f)::value, decltype(m)::value>(dy, dx, stream);
    });
    if (done) return;
    const ItemGrid grid(dy.n * dy.c, dy.h / factor * (dy.w / factor));
    const auto kernel = upsample_adjoint_any_kernel<T>;
    REVK_LAUNCH(kernel, grid.blocks(), kMaxThreads, 0, stream, dy, static_cast<T*>(dx), factor,
                mode, grid);
  });
}

}  // namespace revkernels::cuda
