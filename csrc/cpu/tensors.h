// From torch's tensors to the kernels' arguments, with the checks that keep memory safe.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../storage.h"
#include "kernels.h"

namespace revkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const Name& name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, ": dtype ", torch::headeronly::toString(t.scalar_type()),
                  " is not supported; use float32, float64, float16 or bfloat16");
}

inline Map map_of(const Tensor& t, const Name& name, DType dtype) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected [N, C, H, W], got ", shape_of(t));
  check_storage(t, name);
  Map m;
  m.data = t.data_ptr();
  m.dtype = dtype;
  m.n = t.size(0), m.c = t.size(1), m.h = t.size(2), m.w = t.size(3);
  m.sn = t.stride(0), m.sc = t.stride(1), m.sh = t.stride(2), m.sw = t.stride(3);
  return m;
}

inline Map map_of(const Tensor& t, const Name& name) { return map_of(t, name, dtype_of(t, name)); }

// A map of floats, or an int16 stream, which counts as float32.
inline Map input_of(const Tensor& x, const Name& name) {
  const bool integer = x.scalar_type() == ScalarType::Short;
  return map_of(x, name, integer ? DType::int16 : dtype_of(x, name));
}

inline void check_shape(const Map& m, const Tensor& t, const Name& name, int64_t n, int64_t c,
                        int64_t h, int64_t w) {
  STD_TORCH_CHECK(m.n == n && m.c == c && m.h == h && m.w == w, name, ": expected [", n, ", ", c,
                  ", ", h, ", ", w, "], got ", shape_of(t));
}

inline Map map_of(const Tensor& t, const Name& name, int64_t n, int64_t c, int64_t h, int64_t w) {
  const Map m = map_of(t, name);
  check_shape(m, t, name, n, c, h, w);
  return m;
}

inline bool is_wide(const Map& m) { return m.dtype == DType::float64; }
inline int64_t numel(const Map& m) { return m.n * m.c * m.h * m.w; }

// Distinct indices must be distinct elements: every stride exceeds the extent of the smaller ones.
inline bool has_distinct_elements(const Map& m) {
  std::array<std::pair<int64_t, int64_t>, 4> dims = {
      {{m.sn, m.n}, {m.sc, m.c}, {m.sh, m.h}, {m.sw, m.w}}};
  std::sort(dims.begin(), dims.end());
  int64_t extent = 0;
  for (const auto& [stride, size] : dims) {
    if (size <= 1) continue;
    if (stride <= extent) return false;
    extent += stride * (size - 1);
  }
  return true;
}

// [C] or, if `per_sample`, [N, C]; an absent one has null data.
inline Coefficient coefficient_of(const std::optional<Tensor>& t, const Name& name, int64_t n,
                                  int64_t c, bool per_channel = true, bool per_sample = false) {
  Coefficient v;
  if (!t.has_value()) return v;
  const int64_t dim = t->dim();
  const bool channel = per_channel && dim == 1 && t->size(0) == c;
  const bool sample = per_sample && dim == 2 && t->size(0) == n && t->size(1) == c;
  STD_TORCH_CHECK(channel || sample, name, ": expected ", per_channel ? "[C]" : "",
                  per_channel && per_sample ? " or " : "", per_sample ? "[N, C]" : "",
                  " with N = ", n, ", C = ", c, ", got ", shape_of(*t));
  STD_TORCH_CHECK(t->is_cpu(), name, ": expected a CPU tensor");
  check_storage(*t, name);
  v.data = t->data_ptr();
  v.dtype = dtype_of(*t, name);
  v.sn = sample ? t->stride(0) : 0;
  v.sc = t->stride(dim - 1);
  return v;
}

// One int64 on the CPU that an op adds to.
inline int64_t* counter_of(const Tensor& t, const Name& name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.numel() == 1, name,
                  ": expected one int64 on the CPU, got ",
                  torch::headeronly::toString(t.scalar_type()), " of shape ", shape_of(t));
  check_storage(t, name);
  return static_cast<int64_t*>(t.data_ptr());
}

// A new contiguous tensor on the CPU; dtype is that of `like` or its accumulate dtype.
inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape) {
  return empty(like, shape);
}

inline ScalarType sums_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_sums(const Tensor& like, std::vector<int64_t> shape) {
  return empty(like, shape, sums_dtype(like));
}

inline Upsampling upsampling_of(const std::string& mode) {
  if (mode == "bilinear") return Upsampling::bilinear;
  STD_TORCH_CHECK(mode == "nearest", "mode: expected 'bilinear' or 'nearest', got '", mode, "'");
  return Upsampling::nearest;
}

inline Activation activation_of(const std::string& act) {
  if (act == "hardswish") return Activation::hardswish;
  STD_TORCH_CHECK(act == "identity", "act: expected 'hardswish' or 'identity', got '", act, "'");
  return Activation::identity;
}

inline void check_fraction_bits(int64_t g) {
  STD_TORCH_CHECK(g >= -8 && g <= 24, "fraction_bits: expected -8 to 24, got ", g);
}

inline void check_factor(int64_t f) {
  STD_TORCH_CHECK(f == 1 || f == 2 || f == 4 || f == 8, "factor: expected 1, 2, 4 or 8, got ", f);
}

// Runs kernel(args, begin, end) over `units` that touch `elements` in all: a thread gets at least
// 16K.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t units,
         int64_t elements) {
  if (units == 0) return;
  const int64_t per_unit = elements / units + 1;
  const int64_t grain = ceil_div(int64_t(1) << 14, per_unit);
  torch::stable::parallel_for(0, units, grain,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace revkernels
