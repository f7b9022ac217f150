#include <algorithm>
#include <array>
#include <cmath>

#include "tensors.h"

namespace revkernels {
namespace {

// The same pairs of elements in as few and as long rows as possible: dimensions in the order of x's
// strides, those without gaps in both maps as one.
void merge_dimensions(Map& x, Map& y) {
  struct Dimension {
    int64_t size = 1, x = 1, y = 1;
  };
  std::array<Dimension, 4> dims = {
      {{x.n, x.sn, y.sn}, {x.c, x.sc, y.sc}, {x.h, x.sh, y.sh}, {x.w, x.sw, y.sw}}};
  std::sort(dims.begin(), dims.end(),
            [](const Dimension& a, const Dimension& b) { return a.x < b.x; });
  std::array<Dimension, 4> merged;  // innermost first
  int last = -1;
  for (const Dimension& d : dims) {
    if (d.size == 1) continue;
    if (last >= 0 && d.x == merged[last].x * merged[last].size &&
        d.y == merged[last].y * merged[last].size) {
      merged[last].size *= d.size;
    } else {
      merged[++last] = d;
    }
  }
  const auto& [w, h, c, n] = merged;
  x.n = y.n = n.size, x.c = y.c = c.size, x.h = y.h = h.size, x.w = y.w = w.size;
  x.sn = n.x, x.sc = c.x, x.sh = h.x, x.sw = w.x;
  y.sn = n.y, y.sc = c.y, y.sh = h.y, y.sw = w.y;
}

void dequantize_(const Tensor& x, const Tensor& y, int64_t fraction_bits) {
  DequantizeArgs args;
  args.x = map_of(x, "x");
  STD_TORCH_CHECK(y.scalar_type() == ScalarType::Short, "y: expected int16, got ",
                  torch::headeronly::toString(y.scalar_type()));
  args.y = map_of(y, "y", DType::int16);
  check_shape(args.y, y, "y", args.x.n, args.x.c, args.x.h, args.x.w);
  STD_TORCH_CHECK(has_distinct_elements(args.x),
                  "x: elements overlap in memory; pass a tensor of its own");
  check_apart({x, "x"}, {{y, "y"}});
  check_fraction_bits(fraction_bits);
  args.step = std::ldexp(1.0, -int(fraction_bits));
  const int64_t elements = numel(args.x);
  if (elements == 0) return;
  merge_dimensions(args.x, args.y);
  const Map& m = args.x;
  run(kernels().dequantize, args, m.n * m.c * m.h * ceil_div(m.w, kDequantizeBlock), elements);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) { m.impl("dequantize_", TORCH_BOX(&dequantize_)); }

}  // namespace revkernels
