#include "pointwise.h"

#include <cstring>

#include "tensors.h"

namespace revkernels {
namespace {

constexpr int64_t kPanelElements = 1 << 13;  // of z, to stay in the first-level cache
// Fewer panels than this share their rows among the threads, at least so many to a block.
constexpr int64_t kFewPanels = 32, kFewRows = 64;
// That transposing z pays for: the sums of many channels, or of few columns.
constexpr int64_t kManyChannels = 192, kFewColumns = 256;

PointwiseArgs pointwise_args(const Tensor& x, const std::optional<Tensor>& scale,
                             const std::optional<Tensor>& shift,
                             const std::optional<Tensor>& gate) {
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale, shift: give both or neither");
  STD_TORCH_CHECK(scale.has_value() || !gate.has_value(), "gate: needs scale and shift");
  PointwiseArgs args;
  args.x = input_of(x, "x");
  args.wide = is_wide(args.x);
  args.scale = coefficient_of(scale, "scale", args.x.n, args.x.c);
  args.shift = coefficient_of(shift, "shift", args.x.n, args.x.c);
  args.gate = coefficient_of(gate, "gate", args.x.n, args.x.c, false, true);
  return args;
}

int64_t work_of(const PointwiseArgs& args) {
  return numel(args.x) * (1 + args.y.c / kProductsPerElement);
}

void pointwise_conv_(Tensor y, const Tensor& x, const Tensor& weight, std::optional<Tensor> scale,
                     std::optional<Tensor> shift, std::optional<Tensor> gate) {
  PointwiseArgs args = pointwise_args(x, scale, shift, gate);
  const Map w = map_of(weight, "weight");
  STD_TORCH_CHECK(w.c == args.x.c && w.h == 1 && w.w == 1,
                  "weight: expected [O, C, 1, 1] with C = ", args.x.c, ", got ", shape_of(weight));
  args.y = map_of(y, "y", args.x.n, w.n, args.x.h, args.x.w);
  STD_TORCH_CHECK(is_wide(args.y) == args.wide, "y: expected ", args.wide ? "" : "not ",
                  "float64 as x is, got ", torch::headeronly::toString(y.scalar_type()));
  STD_TORCH_CHECK(has_distinct_elements(args.y),
                  "y: elements overlap in memory; pass a tensor of its own");
  check_apart({y, "y"},
              {{x, "x"}, {weight, "weight"}, {scale, "scale"}, {shift, "shift"}, {gate, "gate"}});
  if (numel(args.y) == 0) return;
  const ScalarType dtype = sums_dtype(x);
  const Tensor matrix = weight.scalar_type() == dtype ? weight : torch::stable::to(weight, dtype);
  args.weight = matrix.data_ptr();
  args.weight_row = matrix.stride(0), args.weight_column = matrix.stride(1);
  run_pointwise(args);
}

Tensor pointwise_conv_grad_weight(const Tensor& x, const Tensor& dy, std::optional<Tensor> scale,
                                  std::optional<Tensor> shift, std::optional<Tensor> gate) {
  PointwiseArgs args = pointwise_args(x, scale, shift, gate);
  args.y = map_of(dy, "dy");
  check_shape(args.y, dy, "dy", args.x.n, args.y.c, args.x.h, args.x.w);
  Tensor dw = new_sums(x, {args.y.c, args.x.c, 1, 1});
  args.grad_weight = dw.data_ptr();
  if (numel(args.x) == 0 || numel(args.y) == 0) {
    torch::stable::zero_(dw);
    return dw;
  }
  run_pointwise_grad_weight(args);
  return dw;
}

}  // namespace

void run_pointwise(PointwiseArgs args) {
  args.panel =
      std::max(kPanelElements / std::max(args.x.c, int64_t(1)) / kPanelColumns, int64_t(1)) *
      kPanelColumns;
  const int64_t panels = ceil_div(args.x.n * args.x.h * args.x.w, args.panel);
  args.blocks = std::min(ceil_div(kFewPanels, panels), ceil_div(args.y.c, kFewRows));
  run(kernels().pointwise, args, panels * args.blocks, work_of(args));
}

void run_pointwise_grad_weight(PointwiseArgs args) {
  int64_t units = ceil_div(args.x.c, kDotRows);
  args.blocks = 0;
  const int64_t columns = args.x.n * args.x.h * args.x.w;
  if (std::min(args.x.c, args.y.c) >= kManyChannels || columns <= kFewColumns) {
    const int64_t panels = ceil_div(args.x.c, kPanelChannels);
    args.panel = ceil_div(ceil_div(args.x.c, panels), 16) * 16;
    args.blocks = ceil_div(args.y.c, kBlockRows);
    units = ceil_div(args.x.c, args.panel) * args.blocks;
  } else if (!args.add) {
    const size_t bytes = size_t(args.x.c * args.y.c) * (args.wide ? 8 : 4);
    std::memset(args.grad_weight, 0, bytes);
  }
  run(kernels().pointwise_grad_weight, args, units, work_of(args));
}

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) {
  m.impl("pointwise_conv_", TORCH_BOX(&pointwise_conv_));
  m.impl("pointwise_conv_grad_weight", TORCH_BOX(&pointwise_conv_grad_weight));
}

}  // namespace revkernels
