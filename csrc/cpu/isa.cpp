#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace revkernels {

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

// Widest first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> all;
#if defined(REVK_X86_MULTIVERSION)
  // GCC 12 has no name for f16c here; every processor with AVX2 has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  all.push_back({&avx512::kernels, avx512});
  all.push_back({&avx2::kernels, avx2});
#endif
  all.push_back({&baseline::kernels, true});
  return all;
}

const Kernels& choose() {
  const char* asked = std::getenv("REVKERNELS_CPU_ISA");
  for (const Candidate& candidate : candidates()) {
    if (candidate.runs && (asked == nullptr || std::string(asked) == candidate.kernels->name)) {
      return *candidate.kernels;
    }
  }
  throw std::runtime_error(
      "REVKERNELS_CPU_ISA: '" + std::string(asked) +
      "' is not compiled in or not supported by this processor; use baseline, avx2 or avx512");
}

// A thread's block of scratch. Kernels on tiny maps would spend more time in malloc than at work.
class Block {
 public:
  ~Block() { std::free(start_); }

  // Null if there is no room.
  void* take(int64_t bytes) {
    if (start_ == nullptr) start_ = static_cast<char*>(std::aligned_alloc(64, kBytes));
    if (start_ == nullptr || used_ + bytes > kBytes) return nullptr;
    char* piece = start_ + used_;
    used_ += bytes;
    return piece;
  }

  // Whether it was of this block; pieces come back last in, first out.
  bool give_back(void* piece) {
    const auto at = reinterpret_cast<uintptr_t>(piece), start = reinterpret_cast<uintptr_t>(start_);
    if (start_ == nullptr || at < start || at >= start + kBytes) return false;
    used_ = int64_t(at - start);
    return true;
  }

 private:
  static constexpr int64_t kBytes = 1 << 18;

  char* start_ = nullptr;
  int64_t used_ = 0;
};

thread_local Block block;

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void* allocate_scratch(int64_t bytes) {
  const int64_t size = ceil_div(std::max(bytes, int64_t(1)), 64) * 64;
  if (void* piece = block.take(size)) return piece;
  void* scratch = std::aligned_alloc(64, size_t(size));
  if (scratch == nullptr) throw std::bad_alloc();
  return scratch;
}

void free_scratch(void* scratch) {
  if (!block.give_back(scratch)) std::free(scratch);
}

}  // namespace revkernels
