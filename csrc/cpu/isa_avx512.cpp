#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(REVK_X86_MULTIVERSION)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")
#define REVK_ISA avx512
#define REVK_NAME "avx512"
#define REVK_BYTES 64
#define REVK_AVX512
#include "isa_body.h"
#endif
