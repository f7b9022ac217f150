// Squeeze-excite's two layers and their gradients: checks and allocation.
#include <tuple>

#include "tensors.h"

namespace revkernels {
namespace {

using namespace cuda;

struct Sizes {
  int64_t n, c, r;

  Sizes(const Tensor& pooled, const Tensor& w1) {
    STD_TORCH_CHECK(pooled.is_cuda() && pooled.dim() == 2,
                    "pooled: expected a CUDA tensor [N, C], got ", shape_of(pooled));
    STD_TORCH_CHECK(w1.dim() == 2, "w1: expected [R, C], got ", shape_of(w1));
    n = pooled.size(0), c = pooled.size(1), r = w1.size(0);
  }
};

Tensor rounded(const Tensor& sums, const Tensor& like) {
  const ScalarType dtype = like.scalar_type();
  return sums.scalar_type() == dtype ? sums : torch::stable::to(sums, dtype);
}

std::tuple<Tensor, Tensor> se_gate(const Tensor& pooled, const Tensor& w1, const Tensor& b1,
                                   const Tensor& w2, const Tensor& b2) {
  const Sizes s(pooled, w1);
  const Dtype dtype = dtype_of(pooled, "pooled");
  const Values in(pooled, "pooled", pooled, {s.n, s.c});
  const Values first(w1, "w1", pooled, {s.r, s.c}), first_bias(b1, "b1", pooled, {s.r});
  const Values second(w2, "w2", pooled, {s.c, s.r}), second_bias(b2, "b2", pooled, {s.c});
  const Tensor hidden = new_sums(pooled, {s.n, s.r}), gate = new_sums(pooled, {s.n, s.c});
  if (s.n > 0) {
    run(pooled, [&](Stream stream) {
      cuda::se_gate(
          dtype,
          {first.data(), first_bias.data(), second.data(), second_bias.data(), s.n, s.c, s.r},
          in.data(), hidden.mutable_data_ptr(), gate.mutable_data_ptr(), stream);
    });
  }
  return {rounded(gate, pooled), rounded(hidden, pooled)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> se_gate_grad(
    const Tensor& dgate, const Tensor& gate, const Tensor& hidden, const Tensor& pooled,
    const Tensor& w1, const Tensor& w2) {
  const Sizes s(pooled, w1);
  const Dtype dtype = dtype_of(dgate, "dgate");
  const Values dg(dgate, "dgate", dgate, {s.n, s.c}), g(gate, "gate", dgate, {s.n, s.c});
  const Values u(hidden, "hidden", dgate, {s.n, s.r}), in(pooled, "pooled", dgate, {s.n, s.c});
  const Values first(w1, "w1", dgate, {s.r, s.c}), second(w2, "w2", dgate, {s.c, s.r});
  const Tensor dhidden = new_sums(dgate, {s.n, s.r}), dpooled = new_sums(dgate, {s.n, s.c});
  const Tensor dw1 = new_sums(dgate, {s.r, s.c}), db1 = new_sums(dgate, {s.r});
  const Tensor dw2 = new_sums(dgate, {s.c, s.r}), db2 = new_sums(dgate, {s.c});
  run(dgate, [&](Stream stream) {
    cuda::se_gate_grad(
        dtype, {first.data(), nullptr, second.data(), nullptr, s.n, s.c, s.r}, dg.data(), g.data(),
        u.data(), in.data(), 1,
        {dhidden.mutable_data_ptr(), dpooled.mutable_data_ptr(), dw1.mutable_data_ptr(),
         db1.mutable_data_ptr(), dw2.mutable_data_ptr(), db2.mutable_data_ptr()},
        stream);
  });
  return {rounded(dpooled, dgate), rounded(dw1, dgate), rounded(db1, dgate), rounded(dw2, dgate),
          rounded(db2, dgate)};
}

STABLE_TORCH_LIBRARY_IMPL(revkernels, CUDA, m) {
  m.impl("se_gate", TORCH_BOX(&se_gate));
  m.impl("se_gate_grad", TORCH_BOX(&se_gate_grad));
}

}  // namespace
}  // namespace revkernels
