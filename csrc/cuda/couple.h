// couple_ on CUDA, for the module that knows Python.
#pragma once

#include <cstddef>

namespace revkernels::cuda {

// Registers it. `observed` says whether somebody watches Triton's launches now.
void register_couple(bool (*observed)());

// How many launches are known.
size_t remembered_launches();

}  // namespace revkernels::cuda
