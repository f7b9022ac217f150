// Values of an int16 stream: checks.
#include <cmath>

#include "tensors.h"

namespace revkernels {
namespace {

using namespace cuda;

void dequantize_(const Tensor& x, const Tensor& y, int64_t fraction_bits) {
  const Map out = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(y.scalar_type() == ScalarType::Short, "y: expected int16, got ",
                  torch::headeronly::toString(y.scalar_type()));
  check_same_device(y, "y", x);
  const Map in = map_of(y, "y");
  check_shape(in, y, "y", out.n, out.c, out.h, out.w);
  check_distinct(out, "x");
  check_apart({x, "x"}, {{y, "y"}});
  STD_TORCH_CHECK(fraction_bits >= -8 && fraction_bits <= 24,
                  "fraction_bits: expected -8 to 24, got ", fraction_bits);
  if (x.numel() == 0) return;
  run(x, [&](Stream stream) {
    cuda::convert(Dtype::int16, in, dtype, out, std::ldexp(1.0, -int(fraction_bits)), false,
                  stream);
  });
}

STABLE_TORCH_LIBRARY_IMPL(revkernels, CUDA, m) { m.impl("dequantize_", TORCH_BOX(&dequantize_)); }

}  // namespace
}  // namespace revkernels
