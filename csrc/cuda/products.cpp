#include "products.h"

namespace revkernels::cuda {
namespace {

int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : (dtype == Dtype::float32 ? 4 : 2);
}

Tensor tensor_of(const Matrices& m, ScalarType dtype, int device) {
  const std::array<int64_t, 3> sizes = {m.batch, m.rows, m.columns};
  const std::array<int64_t, 3> strides = {m.stride_b, m.stride_r, m.stride_c};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<void*>(m.data), 3, sizes.data(), strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

// z with planes as [N, C, H W]: x itself where there is nothing to do.
struct Prologue {
  std::optional<Tensor> kept;
  Matrices z;

  Prologue(const Tensor& like, Dtype dtype, const Map& x, const Norm& norm, Stream stream) {
    if (norm.scale == nullptr && is_dense(x)) {
      z = matrices_of(x);
      return;
    }
    kept = torch::stable::new_empty(like, {x.n, x.c, x.h, x.w}, scalar_type(dtype));
    const Output out = output_of(*kept);
    bn_act(dtype, x, norm, out, stream);
    z = {out.data, x.n, x.c, x.h * x.w, out.stride_n, out.stride_c, 1};
  }
};

// The contraction over samples and pixels in `parts` of `length`, rows of `pitch` values.
struct Contraction {
  int64_t parts, length, pitch;

  Contraction(int64_t k, int64_t outputs, int64_t tiles, int64_t sum_bytes) {
    // Until tiles fill a large GPU; shorter parts cost more than they give.
    constexpr int64_t kTiles = 256, kShortest = 512;
    parts =
        std::min({ceil_div(kTiles, tiles), k / kShortest, kPartialBytes / (outputs * sum_bytes)});
    parts = std::max(parts, int64_t(1));
    length = ceil_div(ceil_div(k, parts), 8) * 8;  // 16-byte rows in every dtype
    pitch = parts * length;
  }

  // [parts, C, length] of packed rows.
  Matrices of(const void* packed, int64_t channels) const {
    return {packed, parts, channels, length, length, pitch, 1};
  }
};

Matrices transposed(const Matrices& m) {
  return {m.data, m.batch, m.columns, m.rows, m.stride_b, m.stride_c, m.stride_r};
}

}  // namespace

ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return ScalarType::Float;
    case Dtype::float64:
      return ScalarType::Double;
    case Dtype::float16:
      return ScalarType::Half;
    case Dtype::bfloat16:
      return ScalarType::BFloat16;
    case Dtype::int16:
      break;
  }
  return ScalarType::Short;
}

Matrices matrices_of(const Map& m) {
  return {m.data, m.n, m.c, m.h * m.w, m.stride_n, m.stride_c, 1};
}

void multiply(Dtype dtype, int device, const Matrices& out, const Matrices& a, const Matrices& b,
              bool add, bool sums) {
  const ScalarType type = scalar_type(dtype);
  const ScalarType out_type = sums && type != ScalarType::Double ? ScalarType::Float : type;
  const Tensor left = tensor_of(a, type, device), right = tensor_of(b, type, device);
  const Tensor to = tensor_of(out, out_type, device);
  if (out_type != type) {
    std::array<StableIValue, 4> stack = {
        torch::stable::detail::from(left), torch::stable::detail::from(right),
        torch::stable::detail::from(out_type), torch::stable::detail::from(to)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::bmm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // `to` again, to be released
  } else if (add) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_baddbmm_out(to.get(), to.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_bmm_out(to.get(), left.get(), right.get()));
  }
}

void pointwise(const Tensor& like, Dtype dtype, const Map& y, const Map& x, const Matrices& weight,
               const Norm& norm, bool add, Stream stream) {
  const Prologue prologue(like, dtype, x, norm, stream);
  Matrices w = weight;
  w.batch = x.n, w.stride_b = 0;
  multiply(dtype, like.get_device_index(), matrices_of(y), w, prologue.z, add);
}

void pointwise_grad_weight(const Tensor& like, Dtype dtype, void* dw, const Map& x, const Map& dy,
                           const Norm& norm, bool add, Stream stream) {
  const int64_t pixels = x.h * x.w, outputs = dy.c * x.c;
  const int64_t sum_bytes = dtype == Dtype::float64 ? 8 : 4;
  const ScalarType sums = dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  const int device = like.get_device_index();
  const auto fold = [&](const Matrices& a, const Matrices& b, bool onto) {
    std::optional<Tensor> products;
    void* to = dw;
    if (a.batch > 1 || onto) {
      products = torch::stable::new_empty(like, {a.batch, dy.c, x.c}, sums);
      to = products->mutable_data_ptr();
    }
    multiply(dtype, device, {to, a.batch, dy.c, x.c, outputs, x.c, 1}, a, b, false, true);
    if (to != dw) fold_parts(dtype, to, a.batch, 1, outputs, dw, outputs, onto, stream);
  };

  if (is_dense(dy) && (x.n == 1 || x.n * outputs * sum_bytes <= kPartialBytes)) {
    const Prologue prologue(like, dtype, x, norm, stream);
    return fold(matrices_of(dy), transposed(prologue.z), add);
  }
  const int64_t tiles = ceil_div(dy.c, 128) * ceil_div(x.c, 128);
  const int64_t sample_bytes = (x.c + dy.c) * pixels * bytes_of(dtype);
  const int64_t group = std::min(x.n, std::max(int64_t(1), kPackedBytes / sample_bytes));
  for (int64_t begin = 0; begin < x.n; begin += group) {
    const int64_t samples = std::min(group, x.n - begin), k = samples * pixels;
    const Contraction contraction(k, outputs, tiles, sum_bytes);
    const auto pack = [&](Map m, const Norm& n) {
      m.data = static_cast<const char*>(m.data) + begin * m.stride_n * bytes_of(dtype);
      m.n = samples;
      Tensor packed = torch::stable::new_empty(like, {m.c, contraction.pitch}, scalar_type(dtype));
      bn_act(dtype, m, n, {packed.mutable_data_ptr(), pixels, contraction.pitch}, stream);
      zero_tails(dtype, packed.mutable_data_ptr(), m.c, contraction.pitch, k, stream);
      return packed;
    };
    Norm of_group = norm;
    if (norm.gate != nullptr) {
      of_group.gate = static_cast<const char*>(norm.gate) + begin * x.c * sum_bytes;
    }
    const Tensor z = pack(x, of_group),
                 g = pack(dy, {nullptr, nullptr, nullptr, Activation::identity});
    fold(contraction.of(g.const_data_ptr(), dy.c),
         transposed(contraction.of(z.const_data_ptr(), x.c)), add || begin > 0);
  }
}

}  // namespace revkernels::cuda
