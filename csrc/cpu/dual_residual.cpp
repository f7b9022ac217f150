#include <cmath>

#include "tensors.h"

namespace revkernels {
namespace {

bool is_contiguous(const Tensor& t) {
  const Layout layout(t);
  int64_t step = 1;
  for (int64_t d = layout.dim; d-- > 0; step *= layout.sizes[d]) {
    if (layout.sizes[d] > 1 && layout.strides[d] != step) return layout.extent() == 0;
  }
  return true;
}

// All elements of a contiguous tensor as one row.
Map row_of(const Tensor& t, const Name& name, DType dtype, int64_t size) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.numel() == size, name, ": expected ", size, " elements, got ", shape_of(t));
  STD_TORCH_CHECK(is_contiguous(t), name, ": expected contiguous memory; call .contiguous()");
  check_storage(t, name);
  Map m;
  m.data = t.data_ptr();
  m.dtype = dtype;
  m.n = m.c = m.h = m.sw = 1;
  m.w = m.sn = m.sc = m.sh = size;
  return m;
}

int64_t integer_bytes_of(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Int ? 4 : dtype == ScalarType::Short ? 2 : 0;
}

// k of beta = 2^-k.
int64_t bits_of(double beta) {
  int exponent = 0;
  STD_TORCH_CHECK(std::frexp(beta, &exponent) == 0.5 && exponent <= 1 && exponent >= -14,
                  "beta: expected 2^-k with k from 0 to 15 for an integer stream, got ", beta);
  return 1 - exponent;
}

void dual_residual_(const Tensor& y, std::optional<Tensor> x, const Tensor& p, double coefficient,
                    double beta, bool inverse, std::optional<int64_t> fraction_bits,
                    std::optional<Tensor> remainder, std::optional<Tensor> overflow) {
  DualResidualArgs args;
  args.size = y.numel();
  args.integer_bytes = integer_bytes_of(y);
  const bool integer = args.integer_bytes > 0;
  STD_TORCH_CHECK(integer == fraction_bits.has_value(),
                  "fraction_bits: expected an int for int16 and int32 streams alone");
  STD_TORCH_CHECK(integer || (!remainder.has_value() && !overflow.has_value()),
                  "remainder, overflow: expected None without fraction_bits");
  const DType dtype = integer ? DType::int16 : dtype_of(y, "y");
  args.y = row_of(y, "y", dtype, args.size);
  args.p = row_of(p, "p", dtype_of(p, "p"), args.size);
  if (x.has_value()) {
    STD_TORCH_CHECK(x->scalar_type() == y.scalar_type(), "x: expected y's dtype, ",
                    torch::headeronly::toString(y.scalar_type()), ", got ",
                    torch::headeronly::toString(x->scalar_type()));
    args.x = row_of(*x, "x", dtype, args.size);
  }
  args.coefficient = coefficient;
  args.beta = beta;
  args.inverse = inverse;
  args.wide = !integer && is_wide(args.y);
  if (integer) {
    check_fraction_bits(*fraction_bits);
    args.bits = bits_of(beta);
    args.steps = std::ldexp(1.0, int(*fraction_bits));
  }
  STD_TORCH_CHECK(beta != 0, "beta: expected a number other than 0");
  if (remainder.has_value()) {
    STD_TORCH_CHECK(remainder->scalar_type() == ScalarType::Byte, "remainder: expected uint8, got ",
                    torch::headeronly::toString(remainder->scalar_type()));
    const int64_t bytes = ceil_div(args.size, 8) * args.bits;
    args.remainder =
        static_cast<uint8_t*>(row_of(*remainder, "remainder", DType::float16, bytes).data);
  }
  STD_TORCH_CHECK(!inverse || args.bits == 0 || args.remainder || args.size == 0,
                  "remainder: expected the bits that the forward step kept, got None");
  if (overflow.has_value()) args.overflow = counter_of(*overflow, "overflow");
  const std::vector<Argument> arguments = {
      {y, "y"}, {remainder, "remainder"}, {overflow, "overflow"}, {x, "x"}, {p, "p"}};
  for (int written = 0; written < 3; ++written) check_apart(arguments[written], arguments);
  run(kernels().dual_residual, args, ceil_div(args.size, kDualResidualBlock), args.size * 3);
}

void dual_residual_adjoint_(const Tensor& dx, const Tensor& dy, std::optional<Tensor> g,
                            double coefficient, double beta) {
  DualResidualArgs args;
  args.size = dy.numel();
  args.x = row_of(dx, "dx", dtype_of(dx, "dx"), args.size);
  args.y = row_of(dy, "dy", dtype_of(dy, "dy"), args.size);
  STD_TORCH_CHECK(dx.scalar_type() == dy.scalar_type(), "dx: expected dy's dtype, ",
                  torch::headeronly::toString(dy.scalar_type()), ", got ",
                  torch::headeronly::toString(dx.scalar_type()));
  if (g.has_value()) args.p = row_of(*g, "g", dtype_of(*g, "g"), args.size);
  args.coefficient = coefficient;
  args.beta = beta;
  args.wide = is_wide(args.y);
  const std::vector<Argument> arguments = {{dx, "dx"}, {dy, "dy"}, {g, "g"}};
  for (int written = 0; written < 2; ++written) check_apart(arguments[written], arguments);
  run(kernels().dual_residual_adjoint, args, ceil_div(args.size, kDualResidualBlock),
      args.size * 3);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) {
  m.impl("dual_residual_", TORCH_BOX(&dual_residual_));
  m.impl("dual_residual_adjoint_", TORCH_BOX(&dual_residual_adjoint_));
}

}  // namespace revkernels
