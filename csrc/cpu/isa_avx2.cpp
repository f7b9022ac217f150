#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(REVK_X86_MULTIVERSION)
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")
#define REVK_ISA avx2
#define REVK_NAME "avx2"
#define REVK_BYTES 32
#define REVK_AVX2
#include "isa_body.h"
#endif
