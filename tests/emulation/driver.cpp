// C entry points to the emulated kernels, for ctypes: integers are int64_t, null is returned, or
// what went wrong.
#include "cuda_emulation.h"
#include "kernels.h"

namespace {

using namespace revkernels;
using namespace revkernels::cuda;

// Runs the launches, with the threads of a block in order or in reverse.
template <class F>
const char* emulate(int64_t reverse, const F& f) {
  static std::string error;
  emulation::device.error.clear();
  emulation::device.reverse = reverse != 0;
  f();
  error = emulation::device.error;
  return error.empty() ? nullptr : error.c_str();
}

// Kernels with one mistake each.
void divergent_barrier() {
  if (threadIdx.x < 7) __syncthreads();
}

void different_barriers() {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void missing_barrier(float* y) {
  REVK_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = 1;
  y[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

void unaligned_vector(float* y) { REVK_CHECK_ALIGNED(y + 1, 16); }

void shared_overflow() {
  REVK_SHARED(shared);
  shared[16 * blockDim.x] = 0;
}

void global_overflow(float* y) { y[blockDim.x] = 0; }

}  // namespace

extern "C" {

const char* emulate_upsample(int64_t reverse, int64_t dtype, const Map* x, void* y, int64_t factor,
                             int64_t mode) {
  return emulate(reverse,
                 [&] { upsample(Dtype(dtype), *x, y, factor, Upsampling(mode), nullptr); });
}

const char* emulate_upsample_adjoint(int64_t reverse, int64_t dtype, const Map* dy, void* dx,
                                     int64_t factor, int64_t mode) {
  return emulate(
      reverse, [&] { upsample_adjoint(Dtype(dtype), *dy, dx, factor, Upsampling(mode), nullptr); });
}

const char* emulate_space_to_depth(int64_t reverse, int64_t dtype, const Map* x, void* y,
                                   int64_t planes, int64_t block) {
  return emulate(reverse, [&] { space_to_depth(Dtype(dtype), *x, y, planes, block, nullptr); });
}

const char* emulate_depth_to_space(int64_t reverse, int64_t dtype, const Map* y, void* x,
                                   int64_t channels, int64_t block, int64_t sum_copies) {
  return emulate(reverse, [&] {
    depth_to_space(Dtype(dtype), *y, x, channels, block, sum_copies != 0, nullptr);
  });
}

const char* emulate_depthwise_conv(int64_t reverse, int64_t dtype, const Map* x, const void* weight,
                                   int64_t wide, int64_t k, int64_t stride, const void* scale,
                                   const void* shift, void* y) {
  return emulate(reverse, [&] {
    depthwise_conv(Dtype(dtype), *x, {weight, wide != 0, k, stride}, {scale, shift}, y, nullptr);
  });
}

const char* emulate_depthwise_conv_grad_input(int64_t reverse, int64_t dtype, const Map* dy,
                                              const void* weight, int64_t wide, int64_t k,
                                              int64_t stride, void* dx, int64_t height,
                                              int64_t width) {
  return emulate(reverse, [&] {
    depthwise_conv_grad_input(Dtype(dtype), *dy, {weight, wide != 0, k, stride}, dx, height, width,
                              nullptr);
  });
}

int64_t emulate_grad_weight_slices(int64_t dtype, const Map* dy, int64_t k, int64_t stride) {
  return grad_weight_slices(Dtype(dtype), *dy, k, stride);
}

const char* emulate_depthwise_conv_grad_weight(int64_t reverse, int64_t dtype, const Map* x,
                                               const Map* dy, const void* scale, const void* shift,
                                               int64_t k, int64_t stride, void* partial, void* dw) {
  return emulate(reverse, [&] {
    depthwise_conv_grad_weight(Dtype(dtype), *x, *dy, {scale, shift}, k, stride, partial, dw,
                               nullptr);
  });
}

// Runs the named broken kernel on 32 threads; y holds 32 floats.
const char* emulate_mistake(int64_t reverse, const char* name, float* y) {
  const std::string mistake = name;
  return emulate(reverse, [&] {
    if (mistake == "divergent_barrier") REVK_LAUNCH(divergent_barrier, 1, 32, 0, nullptr, );
    if (mistake == "different_barriers") REVK_LAUNCH(different_barriers, 1, 32, 0, nullptr, );
    if (mistake == "missing_barrier") REVK_LAUNCH(missing_barrier, 1, 32, 128, nullptr, y);
    if (mistake == "unaligned_vector") REVK_LAUNCH(unaligned_vector, 1, 32, 0, nullptr, y);
    if (mistake == "shared_overflow") REVK_LAUNCH(shared_overflow, 1, 32, 512, nullptr, );
    if (mistake == "global_overflow") REVK_LAUNCH(global_overflow, 1, 32, 0, nullptr, y);
    if (mistake == "too_much_shared_memory")
      REVK_LAUNCH(divergent_barrier, 1, 32, 49153, nullptr, );
  });
}

}  // extern "C"
