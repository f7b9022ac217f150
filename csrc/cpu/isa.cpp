#include <cstdlib>
#include <cstring>
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

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void* allocate_scratch(int64_t bytes) {
  void* scratch = std::aligned_alloc(64, size_t(ceil_div(bytes, 64) * 64));
  if (scratch == nullptr && bytes > 0) throw std::bad_alloc();
  std::memset(scratch, 0, size_t(bytes));
  return scratch;
}

void free_scratch(void* scratch) { std::free(scratch); }

}  // namespace revkernels
