// The CUDA driver of a GPU that does nothing: what Triton asks, and what torch takes from it by
// name.
#include <cuda.h>
#include <dlfcn.h>

#include "device.h"

using namespace null_gpu;

NULL_GPU_API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function,
                                                          unsigned, unsigned long long,
                                                          cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) {
    *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}

namespace {
CUcontext context_of(int device) {
  return reinterpret_cast<CUcontext>(uintptr_t(64 * (device + 1)));
}
}  // namespace

NULL_GPU_API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
NULL_GPU_API CUresult cuDriverGetVersion(int* version) {
  return *version = CUDA_VERSION, CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuDeviceGetCount(int* n) { return *n = devices(), CUDA_SUCCESS; }
NULL_GPU_API CUresult cuDeviceGet(CUdevice* device, int i) { return *device = i, CUDA_SUCCESS; }
NULL_GPU_API CUresult cuCtxGetDevice(CUdevice* device) { return *device = current, CUDA_SUCCESS; }
NULL_GPU_API CUresult cuCtxGetCurrent(CUcontext* c) {
  return *c = context_of(current), CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuCtxSetCurrent(CUcontext c) {
  return current = int(uintptr_t(c) / 64) - 1, CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice device) {
  return *c = context_of(device), CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute,
                                           CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = 228 << 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
      *value = 65536;
      break;
    default:
      cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);
  }
  return CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = cudaGetErrorString(static_cast<cudaError_t>(error)), CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuModuleLoadData(CUmodule* module, const void*) {
  static std::atomic<uintptr_t> next{4096};
  return *module = reinterpret_cast<CUmodule>(next += 64), CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
NULL_GPU_API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char*) {
  return *function = reinterpret_cast<CUfunction>(module), CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32
                                                                : 0;
  return CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) {
  return CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
namespace {
// What is told of a launch: the kernel, programs, threads, bytes of shared memory, attributes, the
// stream, and where its parameters are.
using Watcher = void (*)(const void* kernel, const unsigned* numbers, const void* stream,
                         void** parameters);
std::atomic<Watcher> watcher{nullptr};

CUresult launch(const void* kernel, const std::array<unsigned, 8>& numbers, const void* stream,
                void** parameters) {
  if (const Watcher each = watcher) each(kernel, numbers.data(), stream, parameters);
  return work(stream, kDriverLaunches), CUDA_SUCCESS;
}
}  // namespace

// Calls `each`, unless it is null, before every launch through the driver.
NULL_GPU_API void null_gpu_watch(Watcher each) { watcher = each; }

NULL_GPU_API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction kernel,
                                       void** parameters, void**) {
  return launch(kernel,
                {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                 c->sharedMemBytes, c->numAttrs},
                c->hStream, parameters);
}
NULL_GPU_API CUresult cuLaunchKernel(CUfunction kernel, unsigned grid_x, unsigned grid_y,
                                     unsigned grid_z, unsigned block_x, unsigned block_y,
                                     unsigned block_z, unsigned shared, CUstream stream,
                                     void** parameters, void**) {
  return launch(kernel, {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, 0}, stream,
                parameters);
}
NULL_GPU_API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status =
             capture_of(stream) ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE,
         CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute,
                                            CUdeviceptr p) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  if (memory.device_of(reinterpret_cast<const void*>(p)) < 0) return CUDA_ERROR_INVALID_VALUE;
  return *static_cast<CUdeviceptr*>(value) = p, CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  return *value = 1 << 20, CUDA_SUCCESS;
}
NULL_GPU_API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
NULL_GPU_API CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  return *n = 1, CUDA_SUCCESS;
}
