// How a 1x1 convolution is cut into units of work.
#pragma once

#include "kernels.h"

namespace revkernels {

// y = W z of complete arguments but for `panel` and `blocks`, which are chosen here.
void run_pointwise(PointwiseArgs args);
// Likewise of the gradient of W; with `add`, what is there already is added to.
void run_pointwise_grad_weight(PointwiseArgs args);

}  // namespace revkernels
