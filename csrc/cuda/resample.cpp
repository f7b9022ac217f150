// Upsampling and the pixel shuffles: checks and allocation.
#include "tensors.h"

namespace revkernels {
namespace {

using namespace cuda;

Upsampling upsampling_of(const std::string& mode) {
  if (mode == "bilinear") return Upsampling::bilinear;
  STD_TORCH_CHECK(mode == "nearest", "mode: expected 'bilinear' or 'nearest', got '", mode, "'");
  return Upsampling::nearest;
}

Tensor upsample(const Tensor& x, int64_t factor, std::string mode) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  const Upsampling upsampling = upsampling_of(mode);
  STD_TORCH_CHECK(factor >= 1, "factor: expected at least 1, got ", factor);
  check_plane("x, upsampled", in.h * factor, in.w * factor);
  Tensor y = new_tensor(x, {in.n, in.c, in.h * factor, in.w * factor});
  if (y.numel() == 0) return y;
  run(x, [&](Stream stream) {
    cuda::upsample(dtype, in, y.mutable_data_ptr(), factor, upsampling, stream);
  });
  return y;
}

Tensor upsample_adjoint(const Tensor& dy, int64_t factor, std::string mode) {
  const Map in = map_of(dy, "dy");
  const Dtype dtype = dtype_of(dy, "dy");
  const Upsampling upsampling = upsampling_of(mode);
  STD_TORCH_CHECK(factor >= 1 && in.h % factor == 0 && in.w % factor == 0,
                  "factor: expected a divisor of dy's height and width, got ", factor, " for ",
                  shape_of(dy));
  Tensor dx = new_tensor(dy, {in.n, in.c, in.h / factor, in.w / factor});
  if (dx.numel() == 0) return dx;
  run(dy, [&](Stream stream) {
    cuda::upsample_adjoint(dtype, in, dx.mutable_data_ptr(), factor, upsampling, stream);
  });
  return dx;
}

void check_sample(const char* name, int64_t c, int64_t h, int64_t w) {
  STD_TORCH_CHECK(h * w == 0 || c <= std::numeric_limits<int32_t>::max() / (h * w), name,
                  ": expected less than 2^31 values in a sample, got ", c, " x ", h, " x ", w);
}

Tensor space_to_depth(const Tensor& x, int64_t planes, int64_t block) {
  const Map in = map_of(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(block >= 1 && in.h % block == 0 && in.w % block == 0,
                  "block: expected a divisor of x's height and width, got ", block, " for ",
                  shape_of(x));
  STD_TORCH_CHECK(planes >= in.c && in.c > 0, "planes: expected at least C = ", in.c,
                  " and C > 0, got ", planes);
  check_sample("x, repeated", planes, in.h, in.w);
  Tensor y = new_tensor(x, {in.n, planes * block * block, in.h / block, in.w / block});
  if (y.numel() == 0) return y;
  run(x, [&](Stream stream) {
    cuda::space_to_depth(dtype, in, y.mutable_data_ptr(), planes, block, stream);
  });
  return y;
}

Tensor to_image(const Tensor& y, const char* name, int64_t channels, int64_t block,
                bool sum_copies) {
  const Map in = map_of(y, name);
  const Dtype dtype = dtype_of(y, name);
  STD_TORCH_CHECK(block >= 1 && in.c % (block * block) == 0, name,
                  ": expected a multiple of block^2 = ", block * block, " channels, got ",
                  shape_of(y));
  const int64_t planes = in.c / (block * block);
  STD_TORCH_CHECK(channels >= 1 && channels <= planes, "channels: expected 1 to ", planes, ", got ",
                  channels);
  check_sample(name, in.c, in.h, in.w);
  Tensor x = new_tensor(y, {in.n, channels, in.h * block, in.w * block});
  if (x.numel() == 0) return x;
  run(y, [&](Stream stream) {
    cuda::depth_to_space(dtype, in, x.mutable_data_ptr(), channels, block, sum_copies, stream);
  });
  return x;
}

Tensor depth_to_space(const Tensor& y, int64_t channels, int64_t block) {
  return to_image(y, "y", channels, block, false);
}

Tensor space_to_depth_adjoint(const Tensor& dy, int64_t channels, int64_t block) {
  return to_image(dy, "dy", channels, block, true);
}

STABLE_TORCH_LIBRARY_IMPL(revkernels, CUDA, m) {
  m.impl("upsample", TORCH_BOX(&upsample));
  m.impl("upsample_adjoint", TORCH_BOX(&upsample_adjoint));
  m.impl("space_to_depth", TORCH_BOX(&space_to_depth));
  m.impl("depth_to_space", TORCH_BOX(&depth_to_space));
  m.impl("space_to_depth_adjoint", TORCH_BOX(&space_to_depth_adjoint));
}

}  // namespace
}  // namespace revkernels
