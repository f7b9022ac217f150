// Maps and vectors as kernels take them: plain pointers with sizes and strides.
#pragma once

#include <cstdint>

#include "common.h"

namespace revkernels {

enum class DType : int { float32, float64, float16, bfloat16, int16 };  // int16: streams

// A [N, C, H, W] map of any strides, counted in elements.
struct Map {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t sn = 0, sc = 0, sh = 0, sw = 0;
};

// A coefficient per channel, or per sample and channel; absent if data is null.
struct Coefficient {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t sn = 0, sc = 0;
};

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : (dtype == DType::float32 ? 4 : 2);
}

// Samples [begin, begin + count) of a map.
inline Map rows(Map m, int64_t begin, int64_t count) {
  m.data = static_cast<char*>(m.data) + begin * m.sn * bytes_of(m.dtype);
  m.n = count;
  return m;
}

inline Coefficient rows(Coefficient v, int64_t begin) {
  if (v.data) v.data = static_cast<const char*>(v.data) + begin * v.sn * bytes_of(v.dtype);
  return v;
}

}  // namespace revkernels
