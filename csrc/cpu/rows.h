// Rows of any dtype and stride as unit-stride rows of the accumulate type A, converted only when
// they have to be: kernels below this line know one arithmetic type and stride 1. Inside namespace
// REVK_ISA.
#pragma once

#include "simd.h"

// Elements handled at a time when a plane is walked as one flat row: a few of these fit in L1.
constexpr int64_t kSegment = 1024;

// std::min would be compiled for this instruction set and linked into code for others.
REVK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
REVK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory of a kernel while it runs.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : start_(static_cast<char*>(allocate_scratch(bytes))), next_(start_) {}
  ~Scratch() { free_scratch(start_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Room for n values and a full vector beyond; aligned.
  template <class A>
  static int64_t bytes(int64_t n) {
    return ceil_div(n * int64_t(sizeof(A)) + 2 * REVK_BYTES, 64) * 64;
  }
  template <class A>
  A* take(int64_t n) {
    A* p = reinterpret_cast<A*>(next_);
    next_ += bytes<A>(n);
    return p;
  }
  // The same, zeros everywhere.
  template <class A>
  A* zeros(int64_t n) {
    A* p = take<A>(n);
    memset(p, 0, size_t(bytes<A>(n)));
    return p;
  }

 private:
  char* start_;
  char* next_;
};

template <class A>
REVK_INLINE void clear(A* p, int64_t n) {
  memset(p, 0, size_t(n) * sizeof(A));
}

REVK_INLINE int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : (dtype == DType::float32 ? 4 : 2);
}

REVK_INLINE char* element(const Map& m, int64_t n, int64_t c, int64_t h = 0, int64_t w = 0) {
  return static_cast<char*>(m.data) +
         (n * m.sn + c * m.sc + h * m.sh + w * m.sw) * size_of(m.dtype);
}

REVK_INLINE bool flat(const Map& m) { return (m.w <= 1 || m.sw == 1) && (m.h <= 1 || m.sh == m.w); }

#if defined(REVK_AVX512)
static inline void convert(const bfloat16* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(-1);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, in + i));
    _mm512_mask_storeu_epi32(out + i, mask, _mm512_slli_epi32(wide, 16));
  }
}
static inline void convert(const float16* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(-1);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, in + i)));
  }
}
static inline void convert(const float* in, float16* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(-1);
    const __m512 v = _mm512_maskz_loadu_ps(mask, in + i);
    _mm256_mask_storeu_epi16(out + i, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
}
#elif defined(REVK_AVX2)
static inline void convert(const float16* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
  }
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
static inline void convert(const float* in, float16* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i v = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128((__m128i*)(out + i), v);
  }
  for (; i < n; ++i) out[i] = to_float16(in[i]);
}
#endif

template <class To, class From>
static inline To cast(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, bfloat16> || std::is_same_v<To, float16>) {
    return from_float<To>(float(value));
  } else if constexpr (std::is_same_v<From, int16_t>) {
    return To(value);
  } else {
    return To(to_float(value));
  }
}

template <class T, class A>
static inline void convert(const T* in, A* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = cast<A>(in[i]);
}

template <class T, class A>
static inline void convert_strided(const T* in, int64_t in_stride, A* out, int64_t out_stride,
                                   int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i * out_stride] = cast<A>(in[i * in_stride]);
}

template <class A, class T>
static void read_as(const void* data, int64_t stride, A* out, int64_t n) {
  const T* in = static_cast<const T*>(data);
  if (stride == 1) {
    convert(in, out, n);
  } else {
    convert_strided(in, stride, out, 1, n);
  }
}

template <class A, class T>
static void write_as(const A* in, void* data, int64_t stride, int64_t n) {
  T* out = static_cast<T*>(data);
  if (stride == 1) {
    convert(in, out, n);
  } else {
    convert_strided(in, 1, out, stride, n);
  }
}

template <class A>
constexpr DType kDType = std::is_same_v<A, int16_t>  ? DType::int16
                         : std::is_same_v<A, double> ? DType::float64
                                                     : DType::float32;

template <class A>
REVK_INLINE bool direct(const Map& m) {
  return m.dtype == kDType<A> && (m.w <= 1 || m.sw == 1);
}

// out[i] = A(data[i stride]).
template <class A>
static inline void read_row(const Map& m, const char* data, A* out, int64_t n) {
  const int64_t stride = m.w <= 1 ? 1 : m.sw;
  switch (m.dtype) {
    case DType::float32:
      return read_as<A, float>(data, stride, out, n);
    case DType::float64:
      return read_as<A, double>(data, stride, out, n);
    case DType::float16:
      return read_as<A, float16>(data, stride, out, n);
    case DType::bfloat16:
      return read_as<A, bfloat16>(data, stride, out, n);
    case DType::int16:
      return read_as<A, int16_t>(data, stride, out, n);
  }
}

template <class A>
static inline void write_row(const Map& m, const A* in, char* data, int64_t n) {
  const int64_t stride = m.w <= 1 ? 1 : m.sw;
  switch (m.dtype) {
    case DType::float32:
      return write_as<A, float>(in, data, stride, n);
    case DType::float64:
      return write_as<A, double>(in, data, stride, n);
    case DType::float16:
      return write_as<A, float16>(in, data, stride, n);
    case DType::bfloat16:
      return write_as<A, bfloat16>(in, data, stride, n);
    case DType::int16:
      break;
  }
}

// An int16 stream is read and written as it is.
static inline void read_row(const Map& m, const char* data, int16_t* out, int64_t n) {
  read_as<int16_t, int16_t>(data, m.sw, out, n);
}

static inline void write_row(const Map& m, const int16_t* in, char* data, int64_t n) {
  write_as<int16_t, int16_t>(in, data, m.sw, n);
}

// The row itself if it already is unit-stride A, else its copy in scratch.
template <class A>
REVK_INLINE const A* row_as(const Map& m, const char* data, A* scratch, int64_t n) {
  if (direct<A>(m)) return reinterpret_cast<const A*>(data);
  read_row(m, data, scratch, n);
  return scratch;
}

// Where to write a row: in place if it is unit-stride A, else into scratch, for write_row to
// finish.
template <class A>
REVK_INLINE A* row_out(const Map& m, char* data, A* scratch) {
  return direct<A>(m) ? reinterpret_cast<A*>(data) : scratch;
}

template <class A>
REVK_INLINE void finish_row(const Map& m, const A* row, char* data, int64_t n) {
  if (!direct<A>(m)) write_row(m, row, data, n);
}

template <class A>
static A converted_coefficient(const Coefficient& v, int64_t i, A absent) {
  switch (v.dtype) {
    case DType::float32:
      return A(static_cast<const float*>(v.data)[i]);
    case DType::float64:
      return A(static_cast<const double*>(v.data)[i]);
    case DType::float16:
      return A(to_float(static_cast<const float16*>(v.data)[i]));
    case DType::bfloat16:
      return A(to_float(static_cast<const bfloat16*>(v.data)[i]));
    case DType::int16:
      break;
  }
  return absent;
}

template <class A>
REVK_INLINE A coefficient(const Coefficient& v, int64_t n, int64_t c, A absent) {
  if (v.data == nullptr) return absent;
  const int64_t i = n * v.sn + c * v.sc;
  return v.dtype == kDType<A> ? static_cast<const A*>(v.data)[i]
                              : converted_coefficient(v, i, absent);
}

// body(plane, n, c) for planes n C + c, without a division for each.
template <class Body>
REVK_INLINE void for_planes(int64_t begin, int64_t end, int64_t channels, const Body& body) {
  int64_t n = begin / channels, c = begin % channels;
  for (int64_t plane = begin; plane < end; ++plane) {
    body(plane, n, c);
    if (++c == channels) c = 0, ++n;
  }
}

// Walks a plane in segments of at most kSegment elements that are contiguous in every map if flat,
// and never cross a row otherwise: body(row, column, n).
template <class Body>
REVK_INLINE void for_segments(bool is_flat, int64_t h, int64_t w, const Body& body) {
  const int64_t rows = is_flat ? 1 : h, columns = is_flat ? h * w : w;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; column += kSegment) {
      body(row, column, columns - column < kSegment ? columns - column : kSegment);
    }
  }
}

// A plane as rows of unit-stride A, `pitch` apart: the map itself where it is that, else a dense
// copy.
template <class A>
struct Plane {
  const A* data;
  int64_t pitch;
};

template <class A>
static inline Plane<A> plane_as(const Map& m, int64_t n, int64_t c, A* dense) {
  const char* data = element(m, n, c);
  if (direct<A>(m)) return {reinterpret_cast<const A*>(data), m.sh};
  for_segments(flat(m), m.h, m.w, [&](int64_t row, int64_t column, int64_t length) {
    read_row(m, element(m, n, c, row, column), dense + row * m.w + column, length);
  });
  return {dense, m.w};
}

// --- planes side by side ------------------------------------------------------------------------
//
// The rows of a tiny plane fill vectors poorly. There kLanes planes lie side by side instead:
// pixel p of plane l is tile[p kLanes + l].

// Whether planes are to lie side by side: a row of the smaller map fills a fraction of a vector
// only, and a tile of the larger map stays in the caches.
template <class A>
static inline bool in_tiles(const Map& small, const Map& large) {
  constexpr int64_t kFraction = 4, kPixels = 256;
  return small.w * kFraction <= kLanes<A> && large.h * large.w <= kPixels;
}

// body(plane, n, c, count) for tiles of planes n C + c to n C + c + count: sample after sample, so
// that what channels have in common can be kept.
template <class A, class Body>
REVK_INLINE void for_tiles(int64_t begin, int64_t end, int64_t channels, const Body& body) {
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    for (int64_t n = begin / channels; n * channels < end; ++n) {
      const int64_t sample = n * channels, first = larger(begin, sample + c);
      const int64_t last = smaller(end, sample + smaller(c + kLanes<A>, channels));
      if (first < last) body(first, n, first - sample, last - first);
    }
  }
}

// Elements of a tile of planes of `area` pixels, whole groups of pixels.
template <class A>
static inline int64_t tile_size(int64_t area) {
  return ceil_div(area, kLanes<A>) * kLanes<A> * kLanes<A>;
}

// `count` rows of `area` elements into a tile; the last is repeated where there are fewer than
// lanes.
template <class A>
static void rows_to_tile(const A* const* rows, int64_t count, int64_t area, A* tile) {
  constexpr int L = kLanes<A>;
  for (int64_t p = 0; p < area; p += L) {
    Vec<A> v[L];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) v[l] = load_left(rows[l < count ? l : count - 1] + p, area - p);
    transpose<A>(v);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) store(tile + (p + l) * L, v[l]);
  }
}

template <class A>
static void tile_to_rows(const A* tile, int64_t count, int64_t area, A* const* rows) {
  constexpr int L = kLanes<A>;
  for (int64_t p = 0; p < area; p += L) {
    Vec<A> v[L];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) v[l] = load(tile + (p + l) * L);
    transpose<A>(v);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      if (l < count) store_left(rows[l] + p, v[l], area - p);
    }
  }
}

// Planes c to c + count of sample n into a tile; `dense` has room for them where they are not flat
// rows of A.
template <class A>
static void read_tile(const Map& m, int64_t n, int64_t c, int64_t count, A* dense, A* tile) {
  constexpr int L = kLanes<A>;
  if (m.h * m.w == 4 && count == L && m.sc == 4 && flat(m) && direct<A>(m)) {  // one row of all
    return deinterleave_pow2<A, 4>(reinterpret_cast<const A*>(element(m, n, c)), tile, L, L);
  }
  const A* rows[L];
  for (int64_t l = 0; l < count; ++l) {
    A* copy = dense + l * m.h * m.w;
    const Plane<A> plane = plane_as(m, n, c + l, copy);
    rows[l] = plane.data;
    if (plane.pitch == m.w || m.h <= 1) continue;
    for (int64_t h = 0; h < m.h; ++h) convert(plane.data + h * plane.pitch, copy + h * m.w, m.w);
    rows[l] = copy;
  }
  rows_to_tile(rows, count, m.h * m.w, tile);
}

// The inverse, into a contiguous map.
template <class A>
static void write_tile(const Map& m, int64_t n, int64_t c, int64_t count, A* dense, const A* tile) {
  const int64_t area = m.h * m.w;
  A* rows[kLanes<A>];
  for (int64_t l = 0; l < count; ++l) {
    rows[l] = direct<A>(m) ? reinterpret_cast<A*>(element(m, n, c + l)) : dense + l * area;
  }
  tile_to_rows(tile, count, area, rows);
  if (direct<A>(m)) return;
  for (int64_t l = 0; l < count; ++l) write_row(m, rows[l], element(m, n, c + l), area);
}

// Coefficients of channels c to c + count, one to a lane.
template <class A>
static inline Vec<A> coefficients(const Coefficient& v, int64_t n, int64_t c, int64_t count,
                                  A absent) {
  if (v.data == nullptr) return splat(absent);
  if (v.dtype == kDType<A> && v.sc == 1) {
    return load_left(static_cast<const A*>(v.data) + n * v.sn + c, count);
  }
  A lanes[kLanes<A>] = {};
  for (int64_t l = 0; l < count; ++l) lanes[l] = coefficient(v, n, c + l, absent);
  return load(lanes);
}
