#include <cmath>
#include <tuple>

#include "tensors.h"

namespace revkernels {
namespace {

// A stream: int16 with fraction bits only, 16-bit float without them only.
Map stream_of(const Tensor& y, std::optional<int64_t> fraction_bits) {
  const bool integer = y.scalar_type() == ScalarType::Short;
  const DType dtype = integer ? DType::int16 : dtype_of(y, "y");
  STD_TORCH_CHECK(!integer || fraction_bits.has_value(),
                  "fraction_bits: expected an int, as y is int16, got None");
  if (fraction_bits.has_value()) check_fraction_bits(*fraction_bits);
  STD_TORCH_CHECK(
      !fraction_bits.has_value() || (dtype != DType::float16 && dtype != DType::bfloat16),
      "y: expected int16, float32 or float64, as fraction_bits is given, got ",
      torch::headeronly::toString(y.scalar_type()));
  return map_of(y, "y", dtype);
}

void couple_(const Tensor& y, std::vector<Tensor> p, std::vector<std::optional<Tensor>> scale,
             std::vector<std::optional<Tensor>> shift, std::vector<int64_t> factors,
             std::string mode, bool subtract, std::optional<int64_t> fraction_bits,
             std::optional<Tensor> overflow) {
  CoupleArgs args;
  args.y = stream_of(y, fraction_bits);
  if (fraction_bits.has_value()) args.steps = std::ldexp(1.0, int(*fraction_bits));
  if (overflow.has_value()) {
    STD_TORCH_CHECK(fraction_bits.has_value(), "overflow: expected None without fraction_bits");
    args.overflow = counter_of(*overflow, "overflow");
  }
  STD_TORCH_CHECK(has_distinct_elements(args.y),
                  "y: elements overlap in memory; pass a tensor of its own");
  STD_TORCH_CHECK(
      scale.size() == p.size() && shift.size() == p.size() && factors.size() == p.size(),
      "p, scale, shift, factors: expected equal lengths, got ", p.size(), ", ", scale.size(), ", ",
      shift.size(), ", ", factors.size());
  std::vector<Argument> arguments = {{y, "y"}, {overflow, "overflow"}};
  std::vector<Contribution> terms(p.size());
  for (int64_t k = 0; k < int64_t(p.size()); ++k) {
    const int64_t f = factors[k];
    check_factor(f);
    STD_TORCH_CHECK(args.y.h % f == 0 && args.y.w % f == 0,
                    "y: height and width must be multiples of factor ", f, ", got ", shape_of(y));
    const Name p_k("p", k), a_k("scale", k), b_k("shift", k);
    terms[k].p = map_of(p[k], p_k, args.y.n, args.y.c, args.y.h / f, args.y.w / f);
    terms[k].scale = coefficient_of(scale[k], a_k, args.y.n, args.y.c, true, true);
    terms[k].shift = coefficient_of(shift[k], b_k, args.y.n, args.y.c, true, true);
    terms[k].factor = f;
    arguments.insert(arguments.end(), {{p[k], p_k}, {scale[k], a_k}, {shift[k], b_k}});
  }
  check_apart(arguments[0], arguments);
  check_apart(arguments[1], arguments);
  args.terms = terms.data();
  args.count = int64_t(terms.size());
  args.mode = upsampling_of(mode);
  args.sign = subtract ? -1 : 1;
  args.wide = is_wide(args.y);
  if (numel(args.y) > 0 && args.count > 0) {
    run(kernels().couple, args, args.y.n * args.y.c, numel(args.y) * (1 + args.count));
  }
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> couple_adjoint(
    const Tensor& dy, std::vector<std::optional<Tensor>> p,
    std::vector<std::optional<Tensor>> center, std::vector<int64_t> factors, std::string mode) {
  CoupleAdjointArgs args;
  args.dy = map_of(dy, "dy");
  const Map& g = args.dy;
  STD_TORCH_CHECK(center.size() == p.size() && factors.size() == p.size(),
                  "p, center, factors: expected equal lengths, got ", p.size(), ", ", center.size(),
                  ", ", factors.size());
  std::vector<Tensor> dus, sums;
  std::vector<Gather> terms(p.size());
  bool work = false;
  for (int64_t k = 0; k < int64_t(p.size()); ++k) {
    const int64_t f = factors[k];
    check_factor(f);
    STD_TORCH_CHECK(g.h % f == 0 && g.w % f == 0,
                    "dy: height and width must be multiples of factor ", f, ", got ", shape_of(dy));
    terms[k].factor = f;
    if (f == 1) {
      dus.push_back(new_tensor(dy, {0}));
    } else {
      dus.push_back(new_tensor(dy, {g.n, g.c, g.h / f, g.w / f}));
      terms[k].du = map_of(dus[k], "du");
    }
    if (p[k].has_value()) {
      terms[k].p = map_of(*p[k], {"p", k}, g.n, g.c, g.h / f, g.w / f);
      terms[k].center = coefficient_of(center[k], {"center", k}, g.n, g.c);
      sums.push_back(new_sums(dy, {2, g.n, g.c}));
      terms[k].sums = sums[k].data_ptr();
      terms[k].sums_stride = g.n * g.c;
    } else {
      sums.push_back(new_sums(dy, {0}));
    }
    work = work || f > 1 || p[k].has_value();
  }
  args.terms = terms.data();
  args.count = int64_t(terms.size());
  args.mode = upsampling_of(mode);
  args.wide = is_wide(g);
  if (work && g.n * g.c > 0) {
    run(kernels().couple_adjoint, args, g.n * g.c, numel(g) * (1 + args.count));
  }
  return {dus, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) {
  m.impl("couple_", TORCH_BOX(&couple_));
  m.impl("couple_adjoint", TORCH_BOX(&couple_adjoint));
}

}  // namespace revkernels
