#include <type_traits>
#include <utility>

#include "kernels.h"

#define REVK_ISA baseline
#define REVK_NAME "baseline"
#define REVK_BYTES 32
#include "isa_body.h"
