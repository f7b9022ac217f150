#include "tensors.h"

namespace revkernels {
namespace {

Tensor upsample(const Tensor& x, int64_t factor, std::string mode) {
  check_factor(factor);
  Contribution term;
  term.p = map_of(x, "x");
  term.factor = factor;
  CoupleArgs args;
  args.mode = upsampling_of(mode);
  Tensor y = new_tensor(x, {term.p.n, term.p.c, term.p.h * factor, term.p.w * factor});
  args.y = map_of(y, "y");
  args.terms = &term;
  args.count = 1;
  args.assign = true;
  args.wide = is_wide(args.y);
  if (numel(args.y) > 0) run(kernels().couple, args, args.y.n * args.y.c, numel(args.y));
  return y;
}

Tensor upsample_adjoint(const Tensor& dy, int64_t factor, std::string mode) {
  check_factor(factor);
  const Map g = map_of(dy, "dy");
  STD_TORCH_CHECK(g.h % factor == 0 && g.w % factor == 0,
                  "dy: height and width must be multiples of ", factor, ", got ", shape_of(dy));
  if (factor == 1) return upsample(dy, 1, mode);
  Tensor dx = new_tensor(dy, {g.n, g.c, g.h / factor, g.w / factor});
  Gather term;
  term.du = map_of(dx, "dx");
  term.factor = factor;
  CoupleAdjointArgs args;
  args.dy = g;
  args.terms = &term;
  args.count = 1;
  args.mode = upsampling_of(mode);
  args.wide = is_wide(g);
  if (numel(g) > 0) run(kernels().couple_adjoint, args, g.n * g.c, numel(g));
  return dx;
}

Tensor space_to_depth(const Tensor& x, int64_t planes, int64_t block) {
  ShuffleArgs args;
  args.image = map_of(x, "x");
  STD_TORCH_CHECK(block >= 1 && args.image.h % block == 0 && args.image.w % block == 0,
                  "x: height and width must be "
                  "multiples of block = ",
                  block, ", got ", shape_of(x));
  STD_TORCH_CHECK(planes >= args.image.c && args.image.c > 0,
                  "planes: expected at least C = ", args.image.c, " and C > 0, got ", planes);
  args.planes = planes;
  args.block = block;
  Tensor y = new_tensor(
      x, {args.image.n, planes * block * block, args.image.h / block, args.image.w / block});
  args.blocks = map_of(y, "y");
  if (numel(args.blocks) > 0) {
    run(kernels().space_to_depth, args, args.image.n * args.image.c * block, numel(args.blocks));
  }
  return y;
}

Tensor to_image(const Tensor& y, int64_t channels, int64_t block, bool sum_copies,
                const char* name) {
  ShuffleArgs args;
  args.blocks = map_of(y, name);
  STD_TORCH_CHECK(block >= 1 && args.blocks.c % (block * block) == 0, name,
                  ": channels must be a multiple of "
                  "block^2 = ",
                  block * block, ", got ", shape_of(y));
  args.planes = args.blocks.c / (block * block);
  STD_TORCH_CHECK(channels >= 1 && channels <= args.planes, "channels: expected 1 to ", args.planes,
                  ", got ", channels);
  args.block = block;
  args.sum_copies = sum_copies;
  Tensor x = new_tensor(y, {args.blocks.n, channels, args.blocks.h * block, args.blocks.w * block});
  args.image = map_of(x, "x");
  if (numel(args.image) > 0) {
    const int64_t touched = numel(sum_copies ? args.blocks : args.image);
    run(kernels().depth_to_space, args, args.image.n * channels, touched);
  }
  return x;
}

Tensor depth_to_space(const Tensor& y, int64_t channels, int64_t block) {
  return to_image(y, channels, block, false, "y");
}

Tensor space_to_depth_adjoint(const Tensor& dy, int64_t channels, int64_t block) {
  return to_image(dy, channels, block, true, "dy");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) {
  m.impl("upsample", TORCH_BOX(&upsample));
  m.impl("upsample_adjoint", TORCH_BOX(&upsample_adjoint));
  m.impl("space_to_depth", TORCH_BOX(&space_to_depth));
  m.impl("depth_to_space", TORCH_BOX(&depth_to_space));
  m.impl("space_to_depth_adjoint", TORCH_BOX(&space_to_depth_adjoint));
}

}  // namespace revkernels
