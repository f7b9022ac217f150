// Int16 maps to floats. Inside namespace REVK_ISA.
#pragma once

#include "rows.h"

#if defined(REVK_AVX512) || defined(REVK_AVX2)
REVK_INLINE Vec<float> scaled(const int16_t* y, float step, int64_t left) {
  return __builtin_convertvector(load_left(y, left), Vec<float>) * step;
}

static inline void dequantize_row(const int16_t* y, float* x, float step, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    store_left(x + i, scaled(y + i, step, n - i), n - i);
  }
}

// The bits of scaled values, of which the upper half is the bfloat16: nearest, ties to even.
REVK_INLINE IVec<float> rounded(const int16_t* y, float step, int64_t left) {
  const IVec<float> bits = (IVec<float>)scaled(y, step, left);
  return bits + 0x7fff + (bits >> 16 & 1);
}

#if defined(REVK_AVX512)
REVK_INLINE __m512i upper_halves(IVec<float> a, IVec<float> b) {
  const __m512i odd = (__m512i)(iota<float>() * 0x40004 + 0x30001);
  return _mm512_permutex2var_epi16((__m512i)a, odd, (__m512i)b);
}
#else
REVK_INLINE __m256i upper_halves(IVec<float> a, IVec<float> b) {
  const __m256i halves = _mm256_packs_epi32((__m256i)(a >> 16), (__m256i)(b >> 16));
  return _mm256_permute4x64_epi64(halves, 0xd8);
}
#endif

static inline void dequantize_row(const int16_t* y, bfloat16* x, float step, int64_t n) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const auto v = upper_halves(rounded(y + i, step, L), rounded(y + i + L, step, L));
    memcpy(x + i, &v, sizeof(v));
  }
  for (; i < n; i += L) {
    store_left(reinterpret_cast<int16_t*>(x + i), rounded(y + i, step, n - i) >> 16, n - i);
  }
}
#else
static inline void dequantize_row(const int16_t* y, float* x, float step, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = float(y[i]) * step;
}

static inline void dequantize_row(const int16_t* y, bfloat16* x, float step, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of_float(float(y[i]) * step);
    x[i] = {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to_bfloat16, but for NaN
  }
}
#endif

static inline void dequantize_row(const int16_t* y, float16* x, float step, int64_t n) {
  alignas(REVK_BYTES) float wide[kSegment];
  for (int64_t i = 0; i < n; i += kSegment) {
    const int64_t length = n - i < kSegment ? n - i : kSegment;
    dequantize_row(y + i, wide, step, length);
    convert(wide, x + i, length);
  }
}

static inline void dequantize_row(const int16_t* y, double* x, double step, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = double(y[i]) * step;
}

template <class T>
static void dequantize_blocks(const DequantizeArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Map &x = args.x, &y = args.y;
  const A step = A(args.step);
  const int64_t blocks = ceil_div(x.w, kDequantizeBlock);
  for (int64_t unit = begin; unit < end;) {
    const int64_t row = unit / blocks, block = unit % blocks, plane = row / x.h;
    const int64_t n = plane / x.c, c = plane % x.c, h = row % x.h, w = block * kDequantizeBlock;
    const int64_t next = end - unit < blocks - block ? end : unit + blocks - block;
    const int64_t limit = w + (next - unit) * kDequantizeBlock;
    const int64_t length = (limit < x.w ? limit : x.w) - w;
    T* to = reinterpret_cast<T*>(element(x, n, c, h, w));
    const int16_t* from = reinterpret_cast<const int16_t*>(element(y, n, c, h, w));
    if (x.sw == 1 && y.sw == 1) {
      dequantize_row(from, to, step, length);
    } else {
      for (int64_t i = 0; i < length; ++i) to[i * x.sw] = from_float<T>(A(from[i * y.sw]) * step);
    }
    unit = next;
  }
}

static void dequantize(const DequantizeArgs& args, int64_t begin, int64_t end) {
  switch (args.x.dtype) {
    case DType::float32:
      return dequantize_blocks<float>(args, begin, end);
    case DType::float64:
      return dequantize_blocks<double>(args, begin, end);
    case DType::float16:
      return dequantize_blocks<float16>(args, begin, end);
    case DType::bfloat16:
      return dequantize_blocks<bfloat16>(args, begin, end);
    case DType::int16:
      break;
  }
}
