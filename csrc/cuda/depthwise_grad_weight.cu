// Gradient of the depthwise convolution in its weight, with the prologue of the forward:
//
//   dw[c, u, v] = sum_{n, i, j} dy[n, c, i, j] z[n, c, S i + u - P, S j + v - P]
//   z = x, or hardswish(a_c x + b_c)
//
// A block takes a few channels and a slice of the samples. Tiles of x and dy are read once into
// shared memory; a thread keeps K^2 sums (K = 15: three rows of 15) in registers over patches of
// dy. Per output 1 + S^2 values are read and 2 K^2 FLOPs done: bound by memory, except 16-bit maps
// with K = 5, S = 1, which are about even. Threads, then slices, are added in a fixed order:
// deterministic, no atomics.
#include "depthwise.cuh"

namespace revkernels::cuda {
namespace {

// About how many threads of a block sum, and how many blocks there are: the same on every device,
// since the order of summation is part of the result.
constexpr int kLanes = 128;
constexpr int64_t kBlocks = 512;
// Outputs, and parts of their sums, in a block of the second kernel.
constexpr int kReduceOutputs = 32, kReduceParts = 8;

struct Arguments {
  TileSource x, dy;
  Affine prologue;
  void* sums;  // [slices, C, K, K]
  int slices;
  Cut cut;
  TileShape x_tile, dy_tile;
  Divisor by_cols;
  int patches, lanes;  // per plane; and threads among which they are shared
};

template <int K, int S>
struct Gradient : Depthwise<K, S> {
  using Base = Depthwise<K, S>;
  static constexpr int kTapRows = K <= 7 ? K : 3;  // of a thread
  static constexpr int kGroups = K / kTapRows;
  static constexpr int kInRows = (Base::kRows - 1) * S + kTapRows;
  static_assert(K % kTapRows == 0);

  static int dy_pitch(int cols) { return round_up(cols, 4); }
};

template <class T, int K, int S>
__global__ void __launch_bounds__(kMaxThreads, 1) depthwise_grad_weight_kernel(const Arguments a) {
  using A = accumulate_t<T>;
  using D = Gradient<K, S>;
  REVK_SHARED(shared);
  A* x_tile = reinterpret_cast<A*>(shared);
  A* dy_tile = x_tile + a.x_tile.size();
  A* scale = dy_tile + a.dy_tile.size();
  A* shift = scale + a.cut.planes;

  const int channels = int(a.x.map.c);
  const int slice = int(blockIdx.x / unsigned(a.cut.channel_groups));
  const int channel = int(blockIdx.x % unsigned(a.cut.channel_groups)) * a.cut.planes;
  const int planes = min(a.cut.planes, channels - channel);
  if (a.prologue.scale != nullptr) {
    for (int i = threadIdx.x; i < planes; i += blockDim.x) {
      scale[i] = static_cast<const A*>(a.prologue.scale)[channel + i];
      shift[i] = static_cast<const A*>(a.prologue.shift)[channel + i];
    }
  }

  // A team of `lanes` threads sums one plane's taps, or one group of tap rows.
  const int team = int(threadIdx.x) / a.lanes, lane = int(threadIdx.x) % a.lanes;
  const int plane = team / D::kGroups, group = team % D::kGroups;
  A sum[D::kTapRows][K] = {};

  const int64_t last = a.x.map.n * (slice + 1) / a.slices;
  for (int64_t sample = a.x.map.n * slice / a.slices; sample < last; ++sample) {
    for (int tile = 0; tile < a.cut.row_tiles * a.cut.col_tiles; ++tile) {
      const int row0 = tile / a.cut.col_tiles * a.cut.rows,
                col0 = tile % a.cut.col_tiles * a.cut.cols;
      __syncthreads();
      load_tile<T>(a.dy, sample, channel, planes, row0, col0, a.dy_tile, dy_tile, Identity{});
      if (a.prologue.scale != nullptr) {
        load_tile<T>(a.x, sample, channel, planes, row0 * S - D::kPad, col0 * S - D::kPad, a.x_tile,
                     x_tile, Prologue<A>{scale, shift});
      } else {
        load_tile<T>(a.x, sample, channel, planes, row0 * S - D::kPad, col0 * S - D::kPad, a.x_tile,
                     x_tile, Identity{});
      }
      __syncthreads();
      if (plane >= planes) continue;

      for (int patch = lane; patch < a.patches; patch += a.lanes) {
        int col = patch;
        const int row = a.by_cols.split(col) * D::kRows;
        col *= D::kCols;
        const A* grads = dy_tile + (plane * a.dy_tile.rows + row) * a.dy_tile.pitch + col;
        const A* in = x_tile +
                      (plane * a.x_tile.rows + row * S + group * D::kTapRows) * a.x_tile.pitch +
                      col * S;
        A grad[D::kRows][D::kCols];
#pragma unroll
        for (int r = 0; r < D::kRows; ++r)
          load_sums<D::kCols, D::kCols>(grads + r * a.dy_tile.pitch, grad[r]);
#pragma unroll
        for (int i = 0; i < D::kInRows; ++i) {
          A window[D::kWindow];
          load_sums<D::kWindow, 4>(in + i * a.x_tile.pitch, window);
#pragma unroll
          for (int r = 0; r < D::kRows; ++r) {
            const int u = i - r * S;
            if (u < 0 || u >= D::kTapRows) continue;
#pragma unroll
            for (int v = 0; v < K; ++v) {
#pragma unroll
              for (int q = 0; q < D::kCols; ++q) sum[u][v] += grad[r][q] * window[q * S + v];
            }
          }
        }
      }
    }
  }

  // The threads of a team, one tap row at a time, through the memory of the tiles.
  A* buffer = x_tile;
  const int pitch = int(blockDim.x) + 1;
  A* sums = static_cast<A*>(a.sums) + (int64_t(slice) * channels + channel) * K * K;
#pragma unroll
  for (int u = 0; u < D::kTapRows; ++u) {
    __syncthreads();
#pragma unroll
    for (int v = 0; v < K; ++v) buffer[v * pitch + threadIdx.x] = sum[u][v];
    __syncthreads();
    for (int i = threadIdx.x; i < planes * D::kGroups * K; i += blockDim.x) {
      const int v = i % K, from = i / K;
      const A* values = buffer + v * pitch + from * a.lanes;
      A part[4] = {};
      for (int l = 0; l < a.lanes; l += 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (l + j < a.lanes) part[j] += values[l + j];
        }
      }
      const int row = from / D::kGroups * K + from % D::kGroups * D::kTapRows + u;
      sums[row * K + v] = (part[0] + part[1]) + (part[2] + part[3]);
    }
  }
}

// dw[o] = sum_slice partial[slice, o], parts of the slices first, then the parts.
template <class A>
__global__ void __launch_bounds__(kReduceOutputs* kReduceParts)
    reduce_slices_kernel(const A* partial, int slices, int64_t outputs, A* dw) {
  __shared__ A parts[kReduceParts][kReduceOutputs];
  const int lane = int(threadIdx.x) % kReduceOutputs, part = int(threadIdx.x) / kReduceOutputs;
  const int64_t output = int64_t(blockIdx.x) * kReduceOutputs + lane;
  A sum = 0;
  if (output < outputs) {
#pragma unroll 8
    for (int slice = part; slice < slices; slice += kReduceParts)
      sum += partial[slice * outputs + output];
  }
  parts[part][lane] = sum;
  __syncthreads();
  if (part == 0 && output < outputs) {
#pragma unroll
    for (int p = 1; p < kReduceParts; ++p) sum += parts[p][lane];
    dw[output] = sum;
  }
}

// Any odd size, any stride: a block per tap, straight from global memory.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    depthwise_grad_weight_any_kernel(const Map x, const Map dy, const Affine prologue,
                                     int64_t kernel, int64_t stride, accumulate_t<T>* dw) {
  using A = accumulate_t<T>;
  __shared__ A sums[kMaxThreads];
  const int64_t channel = blockIdx.x / (kernel * kernel), tap = blockIdx.x % (kernel * kernel);
  const int64_t du = tap / kernel - (kernel - 1) / 2, dv = tap % kernel - (kernel - 1) / 2;
  const T* in = static_cast<const T*>(x.data) + channel * x.stride_c;
  const T* grads = static_cast<const T*>(dy.data) + channel * dy.stride_c;
  const bool activated = prologue.scale != nullptr;
  const A scale = activated ? static_cast<const A*>(prologue.scale)[channel] : A(1);
  const A shift = activated ? static_cast<const A*>(prologue.shift)[channel] : A(0);

  A sum = 0;
  for (int64_t e = threadIdx.x; e < dy.n * dy.h * dy.w; e += kMaxThreads) {
    const int64_t sample = e / (dy.h * dy.w), i = e / dy.w % dy.h, j = e % dy.w;
    const int64_t row = i * stride + du, col = j * stride + dv;
    if (row < 0 || row >= x.h || col < 0 || col >= x.w) continue;
    const A value = widen(in[sample * x.stride_n + row * x.stride_h + col * x.stride_w]);
    const A grad = widen(grads[sample * dy.stride_n + i * dy.stride_h + j * dy.stride_w]);
    sum += grad * (activated ? hardswish(scale * value + shift) : value);
  }
  sums[threadIdx.x] = sum;
  for (int half = kMaxThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) dw[blockIdx.x] = sums[0];
}

template <class T, int K, int S>
struct Plan {
  using A = accumulate_t<T>;
  using D = Gradient<K, S>;

  static int64_t bytes(int rows, int cols) {
    const int64_t x_values = int64_t(D::tile_rows(rows)) * D::tile_pitch(cols);
    return (x_values + int64_t(rows) * D::dy_pitch(cols) + 2) * int64_t(sizeof(A));
  }
  static Cut cut(const Map& dy) {
    return cut_map(dy.c, dy.h, dy.w, D::kRows, D::kCols, kLanes / D::kGroups, bytes);
  }
  static int64_t slices(const Map& dy) {
    const int64_t wanted = ceil_div(kBlocks, cut(dy).channel_groups);
    return wanted < dy.n ? wanted : dy.n;
  }

  static void launch(const Map& x, const Map& dy, const Affine& prologue, void* partial, void* dw,
                     Stream stream) {
    const Cut c = cut(dy);
    const int count = int(slices(dy)), patch_cols = c.cols / D::kCols;
    const int patches = c.rows / D::kRows * patch_cols;
    const int lanes = int(ceil_div(patches, ceil_div(patches, kLanes / D::kGroups)));
    const int used = c.planes * D::kGroups * lanes;
    const int threads = used < kLanes ? kLanes : round_up(used, 32);
    const int64_t tiles = c.planes * bytes(c.rows, c.cols);
    const int64_t buffer = int64_t(K) * (threads + 1) * sizeof(A);
    const Arguments arguments{TileSource(x),
                              TileSource(dy),
                              prologue,
                              count == 1 ? dw : partial,
                              count,
                              c,
                              TileShape(c.planes, D::tile_rows(c.rows), D::tile_pitch(c.cols)),
                              TileShape(c.planes, c.rows, D::dy_pitch(c.cols)),
                              Divisor(patch_cols),
                              patches,
                              lanes};
    const auto kernel = depthwise_grad_weight_kernel<T, K, S>;
    REVK_LAUNCH(kernel, unsigned(count * c.channel_groups), threads,
                tiles > buffer ? tiles : buffer, stream, arguments);
    if (count == 1) return;
    const int64_t outputs = dy.c * K * K;
    const auto reduce = reduce_slices_kernel<A>;
    REVK_LAUNCH(reduce, unsigned(ceil_div(outputs, kReduceOutputs)), kReduceOutputs * kReduceParts,
                0, stream, static_cast<const A*>(partial), count, outputs, static_cast<A*>(dw));
  }
};

}  // namespace

int64_t grad_weight_slices(Dtype dtype, const Map& dy, int64_t kernel, int64_t stride) {
  int64_t slices = 1;
  dispatch(dtype, [&](auto tag) {
    dispatch_depthwise(kernel, stride, [&](auto k, auto s) {
      slices = Plan<decltype(tag), decltype(k)::value, decltype(s)::value>::slices(dy);
    });
  });
  return slices;
}

void depthwise_conv_grad_weight(Dtype dtype, const Map& x, const Map& dy, const Affine& prologue,
                                int64_t kernel, int64_t stride, void* partial, void* dw,
                                Stream stream) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool tiled = dispatch_depthwise(kernel, stride, [&](auto k, auto s) {
      Plan<T, decltype(k)::value, decltype(s)::value>::launch(x, dy, prologue, partial, dw, stream);
    });
    if (tiled) return;
    const auto any = depthwise_grad_weight_any_kernel<T>;
    REVK_LAUNCH(any, unsigned(x.c * kernel * kernel), kMaxThreads, 0, stream, x, dy, prologue,
                kernel, stride, static_cast<accumulate_t<T>*>(dw));
  });
}

}  // namespace revkernels::cuda
