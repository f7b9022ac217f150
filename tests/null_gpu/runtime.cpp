// The CUDA runtime of a GPU that does nothing: calls succeed at once and kernels do not run.
#include <cstring>

#include "device.h"

using namespace null_gpu;

NULL_GPU_API void null_gpu_counts(int device, int64_t* out) {
  for (int i = 0; i < kCounts; ++i) out[i] = counts[device][i];
}
// Calls `each` with every kernel of the runtime that was launched.
NULL_GPU_API void null_gpu_kernels(void (*each)(const char* name, int64_t launches)) {
  std::lock_guard<std::mutex> guard(kernels.lock);
  for (const auto& [function, kernel] : kernels.found) {
    if (kernel.second > 0) each(kernel.first ? kernel.first : "?", kernel.second);
  }
}

// Every symbol that torch imports and that is not defined here ends up in this.
NULL_GPU_API void null_gpu_unknown(const char* symbol) {
  std::fprintf(stderr, "null GPU: %s is not among its calls; add it to tests/null_gpu\n", symbol);
  std::fflush(stderr);
  std::abort();
}

// Devices ----------------------------------------------------------------------------------------

NULL_GPU_API cudaError_t cudaGetDeviceCount(int* n) { return *n = devices(), cudaSuccess; }
NULL_GPU_API cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
NULL_GPU_API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return fail(cudaErrorInvalidDevice);
  return current = device, cudaSuccess;
}
NULL_GPU_API cudaError_t cudaDriverGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
NULL_GPU_API cudaError_t cudaRuntimeGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
NULL_GPU_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  std::snprintf(p->name, sizeof p->name, "null GPU (sm_%d)", architecture());
  p->major = architecture() / 10, p->minor = architecture() % 10;
  p->totalGlobalMem = kMemory;
  p->multiProcessorCount = 132, p->warpSize = 32, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10, p->l2CacheSize = 50 << 20;
  p->totalConstMem = 65536, p->textureAlignment = 512, p->asyncEngineCount = 3;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = architecture() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = architecture() % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 2147483647;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    default:
      *value = 1;
  }
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int device) {
  return std::snprintf(id, size, "0000:%02x:00.0", device), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  return *can = 0, cudaSuccess;
}
NULL_GPU_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
NULL_GPU_API cudaError_t cudaDeviceSynchronize() {
  count(kSynchronisations);
  return unsafe();
}

// Errors -----------------------------------------------------------------------------------------

NULL_GPU_API cudaError_t cudaPeekAtLastError() { return last_error; }
NULL_GPU_API cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
NULL_GPU_API const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorCapturedEvent:
      return "operation not permitted on an event last recorded in a capturing stream";
    default:
      return "unknown error";
  }
}
NULL_GPU_API const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// Memory -----------------------------------------------------------------------------------------

NULL_GPU_API cudaError_t cudaMalloc(void** p, size_t size) {
  if (const cudaError_t error = unsafe()) return error;
  count(kAllocations);
  *p = memory.allocate(size);
  return *p ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
NULL_GPU_API cudaError_t cudaFree(void* p) {
  if (const cudaError_t error = unsafe()) return error;
  return !p || memory.release(p) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
NULL_GPU_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard<std::mutex> guard(memory.lock);
  return *total = kMemory, *free = kMemory - memory.used[current], cudaSuccess;
}

namespace {
std::mutex pinned_lock;
std::map<const void*, size_t> pinned;

bool is_pinned(const void* p) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto next = pinned.upper_bound(p);
  if (next == pinned.begin()) return false;
  --next;
  return uintptr_t(p) < uintptr_t(next->first) + next->second;
}

// Device memory holds nothing that a kernel made, so nothing is copied within it.
cudaError_t copy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  if (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToHost) std::memcpy(to, from, size);
  return cudaSuccess;
}
}  // namespace

NULL_GPU_API cudaError_t cudaHostAlloc(void** p, size_t size, unsigned) {
  if (const cudaError_t error = unsafe()) return error;
  *p = std::aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  std::lock_guard<std::mutex> guard(pinned_lock);
  pinned[*p] = size;
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaFreeHost(void* p) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  pinned.erase(p);
  return std::free(p), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  *a = {};
  const int device = memory.device_of(p);
  a->type = device >= 0    ? cudaMemoryTypeDevice
            : is_pinned(p) ? cudaMemoryTypeHost
                           : cudaMemoryTypeUnregistered;
  a->device = device;
  a->devicePointer = a->hostPointer = const_cast<void*>(p);
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size,
                                         cudaMemcpyKind kind, cudaStream_t stream) {
  work(stream, kCopies);
  return copy(to, from, size, kind);
}
NULL_GPU_API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  if (const cudaError_t error = unsafe()) return error;
  count(kCopies), count(kSynchronisations);
  return copy(to, from, size, kind);
}
NULL_GPU_API cudaError_t cudaMemcpyPeerAsync(void*, int, const void*, int, size_t,
                                             cudaStream_t stream) {
  return work(stream, kCopies), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaMemset(void*, int, size_t) { return count(kFills), cudaSuccess; }
NULL_GPU_API cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t stream) {
  return work(stream, kFills), cudaSuccess;
}

// Streams and events -----------------------------------------------------------------------------

NULL_GPU_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return *stream = reinterpret_cast<cudaStream_t>(new Stream), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
NULL_GPU_API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return delete reinterpret_cast<Stream*>(stream), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  return *priority = 0, cudaSuccess;
}
NULL_GPU_API cudaError_t cudaStreamQuery(cudaStream_t stream) { return wait_for(stream); }
NULL_GPU_API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  count(kSynchronisations);
  return wait_for(stream);
}
NULL_GPU_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  const CapturePointer capture = reinterpret_cast<Event*>(handle)->capture;
  std::lock_guard<std::mutex> guard(capture_lock);
  if (capture && captures.count(capture)) stream_of(stream)->capture = capture;
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}
NULL_GPU_API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return delete reinterpret_cast<Event*>(event), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream,
                                                  unsigned) {
  count(kEvents);
  reinterpret_cast<Event*>(event)->capture = capture_of(stream);
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
NULL_GPU_API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  if (const cudaError_t error = unsafe()) return error;
  Event* event = reinterpret_cast<Event*>(handle);
  std::lock_guard<std::mutex> guard(capture_lock);
  return event->capture && captures.count(event->capture) ? fail(cudaErrorCapturedEvent)
                                                          : cudaSuccess;
}
NULL_GPU_API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  count(kSynchronisations);
  return cudaEventQuery(event);
}
NULL_GPU_API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 0, cudaSuccess;
}

// Capture ----------------------------------------------------------------------------------------

NULL_GPU_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, capture_mode), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                                       const cudaGraphNode_t*,
                                                       const cudaGraphEdgeData*, size_t,
                                                       cudaStreamCaptureMode mode) {
  static unsigned long long id = 0;
  if (uintptr_t(stream) <= 2) return fail(cudaErrorStreamCaptureUnsupported);  // the default stream
  if (capture_of(stream)) return fail(cudaErrorIllegalState);
  std::lock_guard<std::mutex> guard(capture_lock);
  Stream* s = stream_of(stream);
  s->capture =
      std::make_shared<Capture>(Capture{++id, reinterpret_cast<Graph*>(graph), mode, &this_thread});
  s->began = true;
  captures[s->capture] = 1, ++capturing;
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return cudaStreamBeginCaptureToGraph(stream, reinterpret_cast<cudaGraph_t>(new Graph), nullptr,
                                       nullptr, 0, mode);
}
NULL_GPU_API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  const CapturePointer capture = capture_of(stream);
  if (!capture || !stream_of(stream)->began) return fail(cudaErrorIllegalState);
  std::lock_guard<std::mutex> guard(capture_lock);
  captures.erase(capture), --capturing;
  *stream_of(stream) = {};
  if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream,
                                                  cudaStreamCaptureStatus* status,
                                                  unsigned long long* id, cudaGraph_t* graph,
                                                  const cudaGraphNode_t** dependencies,
                                                  const cudaGraphEdgeData** edges, size_t* count) {
  const CapturePointer capture = capture_of(stream);
  *status = !capture           ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  if (id && capture) *id = capture->id;
  if (graph) *graph = capture ? reinterpret_cast<cudaGraph_t>(capture->graph) : nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaStreamIsCapturing(cudaStream_t stream,
                                               cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
NULL_GPU_API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                                       unsigned long long) {
  *exec = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                              unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
NULL_GPU_API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
  return work(stream, kGraphLaunches), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes,
                                           size_t* count) {
  if (nodes) return fail(cudaErrorNotSupported);
  return *count = reinterpret_cast<Graph*>(graph)->nodes, cudaSuccess;
}
NULL_GPU_API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return delete reinterpret_cast<Graph*>(graph), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return delete reinterpret_cast<Graph*>(exec), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType,
                                                        void* value) {
  return *static_cast<uint64_t*>(value) = 0, cudaSuccess;
}
NULL_GPU_API cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* p, cudaHostFn_t,
                                              unsigned, unsigned) {
  return *object = static_cast<cudaUserObject_t>(p), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned,
                                                   unsigned) {
  return cudaSuccess;
}

// Kernels ----------------------------------------------------------------------------------------

namespace {
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local Configuration configuration;  // between <<<...>>> and the kernel's own stub
}  // namespace

NULL_GPU_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                                  cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
NULL_GPU_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                                    void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  return *static_cast<void**>(stream) = configuration.stream, cudaSuccess;
}
NULL_GPU_API void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
NULL_GPU_API void __cudaRegisterFatBinaryEnd(void**) {}
NULL_GPU_API void __cudaUnregisterFatBinary(void**) {}
NULL_GPU_API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int,
                                         void*, void*, void*, void*, int*) {
  kernels.name(function, name);
}
NULL_GPU_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
NULL_GPU_API char __cudaInitModule(void**) { return 1; }
NULL_GPU_API cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  return *kernel = const_cast<void*>(function), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t,
                                          cudaStream_t stream) {
  kernels.launched(function);
  return work(stream, kLaunches), cudaSuccess;
}
NULL_GPU_API cudaError_t __cudaLaunchKernel(void* function, dim3, dim3, void**, size_t,
                                            cudaStream_t stream) {
  kernels.launched(function);
  return work(stream, kLaunches), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                             void**) {
  kernels.launched(function);
  return work(config->stream, kLaunches), cudaSuccess;
}
NULL_GPU_API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  *a = {};
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->maxDynamicSharedSizeBytes = 227 << 10;
  a->ptxVersion = a->binaryVersion = architecture();
  return cudaSuccess;
}
NULL_GPU_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                                const void*, int,
                                                                                size_t, unsigned) {
  return *blocks = 8, cudaSuccess;
}
NULL_GPU_API cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  return *p = const_cast<void*>(symbol), cudaSuccess;
}
