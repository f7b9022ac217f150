// Tiles of a map in shared memory: zeros outside the map, in the type that sums are kept in.
#pragma once

#include "device.cuh"

namespace revkernels::cuda {

// `planes` channels of one sample, `rows` x `pitch` values each; pitch is a multiple of four.
struct TileShape {
  int planes, rows, pitch;
  Divisor by_rows, by_pitch;

  TileShape(int planes, int rows, int pitch)
      : planes(planes), rows(rows), pitch(pitch), by_rows(rows), by_pitch(pitch) {}

  __host__ __device__ int size() const { return planes * rows * pitch; }
};

// A map, and what loading tiles of it needs to know.
struct TileSource {
  Map map;
  bool dense_planes, dense_channels;  // rows lie one after another, and so do planes
  Divisor by_width, by_height;

  explicit TileSource(const Map& m)
      : map(m),
        dense_planes((m.w == 1 || m.stride_w == 1) && (m.h == 1 || m.stride_h == m.w)),
        dense_channels(dense_planes && (m.c == 1 || m.stride_c == m.h * m.w)),
        by_width(m.w),
        by_height(m.h) {}
};

struct Identity {
  template <class A>
  __device__ __forceinline__ A operator()(A value, int) const {
    return value;
  }
};

// z = hardswish(scale x + shift), by plane of the tile.
template <class A>
struct Prologue {
  const A *scale, *shift;

  __device__ __forceinline__ A operator()(A value, int plane) const {
    return hardswish(scale[plane] * value + shift[plane]);
  }
};

// Any strides: one value per thread and step, neighbours along rows.
template <class T, class F>
__device__ __forceinline__ void load_strided(const TileSource& source, const T* planes_begin,
                                             int planes, int row0, int col0, const TileShape& shape,
                                             accumulate_t<T>* tile, const F& f) {
  const Map& map = source.map;
#pragma unroll 4
  for (int i = threadIdx.x; i < shape.size(); i += blockDim.x) {
    int col = i;
    int row = shape.by_pitch.split(col);
    const int plane = shape.by_rows.split(row);
    row += row0;
    col += col0;
    accumulate_t<T> value = 0;
    if (plane < planes && row >= 0 && row < map.h && col >= 0 && col < map.w) {
      const int64_t at = plane * map.stride_c + row * map.stride_h + col * map.stride_w;
      value = f(widen(planes_begin[at]), plane);
    }
    tile[i] = value;
  }
}

// Whole rows of dense planes are one run of `count` values: 16-byte loads, several in flight,
// whatever its alignment; only the first and last chunk may be partial. The tile must hold zeros
// already.
template <class T, class F>
__device__ __forceinline__ void load_run(const TileSource& source, const T* begin, int count,
                                         int row_shift, int col_shift, const TileShape& shape,
                                         accumulate_t<T>* tile, const F& f) {
  constexpr int V = kVector<T>, kBatch = sizeof(T) >= 4 ? 4 : 2;
  const int width = int(source.map.w), height = int(source.map.h);
  const int lead = int(reinterpret_cast<uintptr_t>(begin) / sizeof(T) % V);
  const int chunks = (lead + count + V - 1) / V;
  const bool chunks_within_rows = lead == 0 && width % V == 0;

  for (int first = threadIdx.x; first < chunks; first += kBatch * blockDim.x) {
    Vector<T, V> chunk[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int e = (first + b * int(blockDim.x)) * V - lead;
      if (e >= 0 && e + V <= count) {
        chunk[b] = Vector<T, V>::load(begin + e);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (e + i >= 0 && e + i < count) chunk[b].value[i] = begin[e + i];
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int e = (first + b * int(blockDim.x)) * V - lead;
      if (e >= count) break;
      int col = e < 0 ? 0 : e;
      int row = source.by_width.split(col);
      int plane = shape.planes == 1 ? 0 : source.by_height.split(row);
      accumulate_t<T>* to =
          tile + (plane * shape.rows + row + row_shift) * shape.pitch + col + col_shift;
      if (chunks_within_rows) {
#pragma unroll
        for (int i = 0; i < V; ++i) to[i] = f(widen(chunk[b].value[i]), plane);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (e + i < 0 || e + i >= count) continue;
          *to++ = f(widen(chunk[b].value[i]), plane);
          if (++col < width) continue;
          col = 0;
          to += shape.pitch - width;
          if (++row < height || shape.planes == 1) continue;
          row = 0;
          ++plane;
          to += (shape.rows - height) * shape.pitch;
        }
      }
    }
  }
}

// Fills the tile with f(map[sample, channel + plane, row0 + row, col0 + col]). Every thread of the
// block must call it; a barrier is needed before the tile is read.
template <class T, class F>
__device__ __forceinline__ void load_tile(const TileSource& source, int64_t sample, int channel,
                                          int planes, int row0, int col0, const TileShape& shape,
                                          accumulate_t<T>* tile, const F& f) {
  const Map& map = source.map;
  const T* begin = static_cast<const T*>(map.data) + sample * map.stride_n + channel * map.stride_c;
  const bool all_columns = col0 <= 0 && col0 + shape.pitch >= map.w;
  const bool all_rows = row0 <= 0 && row0 + shape.rows >= map.h;
  const bool run =
      all_columns && (shape.planes == 1 ? source.dense_planes : all_rows && source.dense_channels);
  if (!run) return load_strided(source, begin, planes, row0, col0, shape, tile, f);

  const Vector<accumulate_t<T>, kVector<accumulate_t<T>>> zeros{};
  for (int i = threadIdx.x * kVector<accumulate_t<T>>; i < shape.size();
       i += blockDim.x * kVector<accumulate_t<T>>) {
    zeros.store(tile + i);
  }
  __syncthreads();
  const int height = int(map.h), width = int(map.w);
  const int first = row0 < 0 ? 0 : row0;
  const int last = row0 + shape.rows < height ? row0 + shape.rows : height;
  const int rows = last > first ? last - first : 0;
  load_run(source, begin + int64_t(first) * width,
           planes == 1 ? rows * width : planes * height * width, first - row0, -col0, shape, tile,
           f);
}

// --- planning ---------------------------------------------------------------------------------

// How a map of H x W outputs is cut: a block makes `rows` x `cols` outputs of `planes` channels.
struct Cut {
  int planes, rows, cols;
  int channel_groups, row_tiles, col_tiles;

  int64_t blocks(int64_t samples) const { return samples * channel_groups * row_tiles * col_tiles; }
};

// The largest cut within kTileBytes, whole maps first, then whole rows. `bytes(rows, cols)` is what
// one plane takes; rows and cols are multiples of `row_step` and `col_step`, and a thread makes
// row_step x col_step outputs.
template <class Bytes>
Cut cut_map(int64_t channels, int64_t height, int64_t width, int row_step, int col_step,
            int wanted_threads, const Bytes& bytes) {
  const auto part = [](int64_t size, int64_t parts, int step) {
    return round_up(int(ceil_div(size, parts)), step);
  };
  int rows = round_up(int(height), row_step), cols = round_up(int(width), col_step);
  for (int64_t parts = 2; bytes(rows, cols) > kTileBytes && rows > row_step; ++parts) {
    rows = part(height, parts, row_step);
  }
  for (int64_t parts = 2; bytes(rows, cols) > kTileBytes && cols > col_step; ++parts) {
    cols = part(width, parts, col_step);
  }
  const int row_tiles = int(ceil_div(height, rows)), col_tiles = int(ceil_div(width, cols));
  int64_t planes = 1;
  if (row_tiles == 1 && col_tiles == 1) {
    const int64_t items = int64_t(rows / row_step) * (cols / col_step);
    const int64_t room = kTileBytes / bytes(rows, cols);
    planes = ceil_div(wanted_threads, items);
    if (planes > room) planes = room < 1 ? 1 : room;
    if (planes > channels) planes = channels;
    planes = ceil_div(channels, ceil_div(channels, planes));
  }
  return {int(planes), rows, cols, int(ceil_div(channels, planes)), row_tiles, col_tiles};
}

// The block's place in a cut: the tile's column is the fastest, the sample the slowest.
struct Place {
  int64_t sample;
  int channel, planes, row, col;

  __device__ __forceinline__ Place(const Cut& cut, unsigned index, int channels) {
    const unsigned col_tile = index % unsigned(cut.col_tiles);
    index /= unsigned(cut.col_tiles);
    const unsigned row_tile = index % unsigned(cut.row_tiles);
    index /= unsigned(cut.row_tiles);
    sample = index / unsigned(cut.channel_groups);
    channel = int(index % unsigned(cut.channel_groups)) * cut.planes;
    planes = min(cut.planes, channels - channel);
    row = int(row_tile) * cut.rows;
    col = int(col_tile) * cut.cols;
  }
};

// Threads for a block with that many items: as few idle as possible, and enough to load the tile.
inline int threads_for(int64_t items) {
  const int64_t rounds = ceil_div(items, kMaxThreads);
  const int threads = round_up(int(ceil_div(items, rounds < 1 ? 1 : rounds)), 32);
  return threads < 128 ? 128 : threads;
}

}  // namespace revkernels::cuda
