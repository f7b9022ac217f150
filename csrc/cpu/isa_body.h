// Every kernel for one instruction set. The including file defines REVK_ISA (a namespace),
// REVK_BYTES (the vector width) and REVK_AVX512 or REVK_AVX2, sets the compiler's target, and has
// included the system headers before that, so that none of their inline functions is compiled for
// it.

namespace revkernels {
namespace REVK_ISA {
namespace {

#include "batch_norm_kernels.h"
#include "coupling_kernels.h"
#include "depthwise_kernels.h"
#include "dequantize_kernels.h"
#include "dual_residual_kernels.h"
#include "pointwise_kernels.h"
#include "rows.h"
#include "shuffle_kernels.h"
#include "simd.h"
#include "squeeze_excite_kernels.h"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    REVK_NAME,
    couple,
    couple_adjoint,
    dequantize,
    dual_residual,
    dual_residual_adjoint,
    space_to_depth,
    depth_to_space,
    depthwise,
    depthwise_grad_input,
    depthwise_grad_weight,
    pointwise,
    pointwise_grad_weight,
    bn_moments,
    bn_act,
    bn_act_squeeze,
    bn_act_grad_sums,
    bn_act_grad,
    layer,
    product,
    gate_slopes,
};

}  // namespace REVK_ISA
}  // namespace revkernels
