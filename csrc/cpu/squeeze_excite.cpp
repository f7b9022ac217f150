#include <algorithm>
#include <tuple>

#include "tensors.h"

namespace revkernels {
namespace {

// A vector or matrix as the kernels read it: contiguous, in the accumulate dtype; itself if it
// already is that, else a copy.
Tensor dense(const Tensor& t, const char* name, std::vector<int64_t> shape, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  bool fits = t.dim() == int64_t(shape.size());
  for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == shape[size_t(d)];
  STD_TORCH_CHECK(fits, name, ": expected ", text_of(shape), ", got ", shape_of(t));
  dtype_of(t, name);
  check_storage(t, name);
  const Tensor converted = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

void check_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected 2 dimensions, got ", shape_of(t));
}

Tensor rounded(const Tensor& sums, const Tensor& like) {
  const ScalarType dtype = like.scalar_type();
  return sums.scalar_type() == dtype ? sums : torch::stable::to(sums, dtype);
}

// out = f(in weight^T + bias), f the identity or hardsigmoid; `active`, if wanted, hardswish(out).
void run_layer(const Tensor& in, const Tensor& weight, const Tensor& bias, const Tensor& out,
               const Tensor* active, bool hardsigmoid) {
  LayerArgs args;
  args.in = in.data_ptr();
  args.weight = weight.data_ptr();
  args.bias = bias.data_ptr();
  args.out = out.data_ptr();
  args.active = active ? active->data_ptr() : nullptr;
  args.n = in.size(0), args.width = weight.size(1), args.rows = weight.size(0);
  args.hardsigmoid = hardsigmoid;
  args.wide = in.scalar_type() == ScalarType::Double;
  if (args.n == 0) return;
  run(kernels().layer, args, ceil_div(args.rows, kDotRows),
      args.n * args.rows * args.width / kProductsPerElement);
}

// out = left right, or left^T right; times hardswish'(hidden) if that is given.
Tensor multiply(const Tensor& left, bool transposed, const Tensor& right, const Tensor* hidden) {
  ProductArgs args;
  args.rows = left.size(transposed ? 1 : 0);
  args.depth = right.size(0), args.columns = right.size(1);
  args.left = left.data_ptr();
  args.left_row = transposed ? 1 : args.depth;
  args.left_column = transposed ? args.rows : 1;
  args.right = right.data_ptr();
  args.hidden = hidden ? hidden->data_ptr() : nullptr;
  args.wide = right.scalar_type() == ScalarType::Double;
  Tensor out = new_tensor(right, {args.rows, args.columns});
  args.out = out.data_ptr();
  if (args.rows == 0) return out;
  run(kernels().product, args, ceil_div(args.columns, kColumnBlock),
      args.rows * args.columns * (args.depth / kProductsPerElement + 1));
  return out;
}

// Sums of columns: the product with a row of ones.
Tensor sum_rows(const Tensor& t) {
  static const float one = 1;
  static const double wide_one = 1;
  ProductArgs args;
  args.rows = 1, args.depth = t.size(0), args.columns = t.size(1);
  args.wide = t.scalar_type() == ScalarType::Double;
  args.left = args.wide ? static_cast<const void*>(&wide_one) : &one;
  args.right = t.data_ptr();
  Tensor out = new_tensor(t, {args.columns});
  args.out = out.data_ptr();
  run(kernels().product, args, ceil_div(args.columns, kColumnBlock), args.depth * args.columns);
  return out;
}

std::tuple<Tensor, Tensor> se_gate(const Tensor& pooled, const Tensor& w1, const Tensor& b1,
                                   const Tensor& w2, const Tensor& b2) {
  check_matrix(pooled, "pooled");
  check_matrix(w1, "w1");
  const int64_t n = pooled.size(0), c = pooled.size(1), r = w1.size(0);
  const ScalarType dtype = sums_dtype(pooled);
  const Tensor in = dense(pooled, "pooled", {n, c}, dtype);
  Tensor hidden = new_tensor(in, {n, r}), active = new_tensor(in, {n, r});
  Tensor gate = new_tensor(in, {n, c});
  run_layer(in, dense(w1, "w1", {r, c}, dtype), dense(b1, "b1", {r}, dtype), hidden, &active,
            false);
  run_layer(active, dense(w2, "w2", {c, r}, dtype), dense(b2, "b2", {c}, dtype), gate, nullptr,
            true);
  return {rounded(gate, pooled), rounded(hidden, pooled)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> se_gate_grad(
    const Tensor& dgate, const Tensor& gate, const Tensor& hidden, const Tensor& pooled,
    const Tensor& w1, const Tensor& w2) {
  check_matrix(pooled, "pooled");
  check_matrix(w1, "w1");
  const int64_t n = pooled.size(0), c = pooled.size(1), r = w1.size(0);
  const ScalarType dtype = sums_dtype(dgate);
  const Tensor in = dense(pooled, "pooled", {n, c}, dtype);
  const Tensor first = dense(w1, "w1", {r, c}, dtype), second = dense(w2, "w2", {c, r}, dtype);
  const Tensor u = dense(hidden, "hidden", {n, r}, dtype);
  const Tensor g = dense(gate, "gate", {n, c}, dtype);
  const Tensor dg = dense(dgate, "dgate", {n, c}, dtype);

  Tensor dv = new_tensor(in, {n, c}), active = new_tensor(in, {n, r});
  GateSlopeArgs args;
  args.dgate = dg.data_ptr(), args.gate = g.data_ptr(), args.hidden = u.data_ptr();
  args.dv = dv.data_ptr(), args.active = active.data_ptr();
  args.gates = n * c, args.hiddens = n * r;
  args.wide = dtype == ScalarType::Double;
  const int64_t elements = std::max(args.gates, args.hiddens);
  run(kernels().gate_slopes, args, ceil_div(elements, kGateSegment), elements);

  const Tensor dhidden = multiply(dv, false, second, &u);
  return {rounded(multiply(dhidden, false, first, nullptr), dgate),
          rounded(multiply(dhidden, true, in, nullptr), dgate), rounded(sum_rows(dhidden), dgate),
          rounded(multiply(dv, true, active, nullptr), dgate), rounded(sum_rows(dv), dgate)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) {
  m.impl("se_gate", TORCH_BOX(&se_gate));
  m.impl("se_gate_grad", TORCH_BOX(&se_gate_grad));
}

}  // namespace revkernels
