// The memory behind an op's tensors: storage that was freed, and arguments that share elements.
//
// Every op, on every device, asks check_storage of each tensor that it takes a pointer of, and an
// op in place check_apart of each tensor that it writes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace revkernels {

// An argument's name in messages: "y", or "p[2]" of a list.
struct Name {
  const char* text;
  int64_t index = -1;

  Name(const char* text, int64_t index = -1) : text(text), index(index) {}

  friend std::ostream& operator<<(std::ostream& out, const Name& name) {
    out << name.text;
    return name.index < 0 ? out : out << "[" << name.index << "]";
  }
};

inline std::string text_of(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return shape.empty() ? "[]" : text + "]";
}

// A tensor's sizes and strides, borrowed from it.
struct Layout {
  int64_t dim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;

  explicit Layout(const torch::stable::Tensor& t) : dim(t.dim()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  }

  // Elements from the first to the last one, counted in memory; 0 of an empty tensor.
  int64_t extent() const {
    int64_t extent = 1;
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] == 0) return 0;
      extent += (sizes[d] - 1) * strides[d];
    }
    return extent;
  }
};

// A contiguous tensor that nothing has written, where `like` is and by default of its dtype. Half
// the host's time of torch::stable::new_empty, which calls the dispatcher with boxed arguments.
inline torch::stable::Tensor empty(
    const torch::stable::Tensor& like, const std::vector<int64_t>& shape,
    std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max(shape[d], int64_t(1))) {
    strides[d] = stride;
  }
  int32_t type = 0, device = 0;
  if (dtype.has_value()) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(),
                                                  strides.data(), type, device,
                                                  like.get_device_index(), &handle));
  return torch::stable::Tensor(handle);
}

inline std::string shape_of(const torch::stable::Tensor& t) {
  const Layout layout(t);
  return text_of(std::vector<int64_t>(layout.sizes, layout.sizes + layout.dim));
}

// Refuses a view that reaches beyond its storage: sharded training frees the storage of a
// parameter that is not in use and leaves its shape.
inline void check_storage(const torch::stable::Tensor& t, const Name& name) {
  const int64_t extent = Layout(t).extent();
  if (extent == 0) return;
  int64_t bytes = 0, offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  const int64_t needed = (offset + extent) * int64_t(t.element_size());
  STD_TORCH_CHECK(bytes >= needed, name, ": expected a storage of at least ", needed,
                  " bytes for a tensor of shape ", shape_of(t), ", got ", bytes,
                  "; its memory was freed or made smaller (untyped_storage().resize_(), or a "
                  "parameter that FSDP has not gathered)");
}

// Solutions of step_1 i_1 + step_2 i_2 + ... = target with low_k <= i_k <= high_k, low_k <= 0 <=
// high_k.
class BoundedSum {
 public:
  void add(int64_t step, int64_t low, int64_t high) {
    for (Term& term : terms_) {
      if (term.step != step) continue;
      term.low += low, term.high += high;
      return;
    }
    terms_.push_back({step, low, high});
  }

  // Exact where no more than `kMostVisits` partial sums need to be looked at, which is where the
  // steps are those of one tensor's dimensions; else true.
  bool reaches(int64_t target) {
    std::sort(terms_.begin(), terms_.end(),
              [](const Term& a, const Term& b) { return a.step > b.step; });
    Rest rest;
    rests_.assign(terms_.size() + 1, rest);
    for (size_t k = terms_.size(); k-- > 0;) {
      const Term& t = terms_[k];
      rest = {rest.low + t.step * t.low, rest.high + t.step * t.high,
              std::gcd(rest.divisor, t.step)};
      rests_[k] = rest;
    }
    visits_ = 0;
    return target == 0 || search(0, target);
  }

 private:
  static constexpr int kMostVisits = 1 << 12;
  struct Term {
    int64_t step, low, high;
  };
  struct Rest {  // of the terms from k on: their least and greatest sum, and what divides all sums
    int64_t low = 0, high = 0, divisor = 0;
  };

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

  bool search(size_t k, int64_t target) {
    const Rest& rest = rests_[k];
    if (target < rest.low || target > rest.high) return false;
    if (k == terms_.size()) return true;
    if (target % rest.divisor != 0) return false;
    if (++visits_ > kMostVisits) return true;
    const auto& [step, low, high] = terms_[k];
    const Rest& after = rests_[k + 1];
    const int64_t first = std::max(low, -floor_div(after.high - target, step));
    const int64_t last = std::min(high, floor_div(target - after.low, step));
    for (int64_t i = first; i <= last; ++i) {
      if (search(k + 1, target - step * i)) return true;
    }
    return false;
  }

  std::vector<Term> terms_;
  std::vector<Rest> rests_;
  int visits_ = 0;
};

// A tensor by its name, and its bytes [begin, end), which may have gaps; an absent one has none.
struct Argument {
  const torch::stable::Tensor* tensor = nullptr;
  Name name;
  uintptr_t begin = 0, end = 0;

  Argument(const torch::stable::Tensor& t, const Name& name) : tensor(&t), name(name) {
    const int64_t extent = Layout(t).extent();
    if (extent == 0) return;
    begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    end = begin + uintptr_t(extent) * t.element_size();
  }
  Argument(const std::optional<torch::stable::Tensor>& t, const Name& name) : name(name) {
    if (t.has_value()) *this = Argument(*t, name);
  }
};

// Whether two tensors have a byte in common. Halves of one map's channels lie within each other's
// [begin, end), and have none.
inline bool share_memory(const Argument& a, const Argument& b) {
  if (a.begin >= b.end || b.begin >= a.end) return false;
  // Byte i of a's element u is byte j of b's element v where
  // strides_a u + i - strides_b v - j = begin_b - begin_a.
  BoundedSum difference;
  const auto add = [&](const torch::stable::Tensor& t, bool minus) {
    const Layout layout(t);
    const int64_t bytes = int64_t(t.element_size());
    const auto add_term = [&](int64_t step, int64_t size) {
      if (size > 1 && step > 0) difference.add(step, minus ? 1 - size : 0, minus ? 0 : size - 1);
    };
    for (int64_t d = 0; d < layout.dim; ++d) add_term(layout.strides[d] * bytes, layout.sizes[d]);
    add_term(1, bytes);
  };
  add(*a.tensor, false);
  add(*b.tensor, true);
  return difference.reaches(int64_t(b.begin) - int64_t(a.begin));
}

// Refuses that an op writes what another argument holds; `others` may list `written` itself.
inline void check_apart(const Argument& written, const std::vector<Argument>& others) {
  for (const Argument& other : others) {
    STD_TORCH_CHECK(other.tensor == written.tensor || !share_memory(written, other), written.name,
                    ": expected memory of its own, as the op writes it, but it shares some with ",
                    other.name);
  }
}

}  // namespace revkernels
