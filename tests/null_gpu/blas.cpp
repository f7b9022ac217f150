// cuBLAS of a GPU that does nothing. Its headers are not needed: a status is an int, and 0 is
// success.
#include "device.h"

using namespace null_gpu;

namespace {
struct Handle {
  void* stream = nullptr;
};

int created(void** object) {
  static std::atomic<uintptr_t> next{4096};
  return *object = reinterpret_cast<void*>(next += 64), 0;
}

int product(const Handle* handle) { return work(handle->stream, kProducts), 0; }
}  // namespace

NULL_GPU_API int cublasCreate_v2(Handle** handle) { return *handle = new Handle, 0; }
NULL_GPU_API int cublasDestroy_v2(Handle* handle) { return delete handle, 0; }
NULL_GPU_API int cublasSetStream_v2(Handle* handle, void* stream) {
  return handle->stream = stream, 0;
}
NULL_GPU_API int cublasSetWorkspace_v2(Handle*, void*, size_t) { return 0; }
NULL_GPU_API int cublasSetMathMode(Handle*, int) { return 0; }
NULL_GPU_API int cublasGetMathMode(Handle*, int* mode) { return *mode = 0, 0; }
NULL_GPU_API int cublasSetPointerMode_v2(Handle*, int) { return 0; }
NULL_GPU_API int cublasGetPointerMode_v2(Handle*, int* mode) { return *mode = 0, 0; }

NULL_GPU_API int cublasSgemm_v2(Handle* handle) { return product(handle); }
NULL_GPU_API int cublasDgemm_v2(Handle* handle) { return product(handle); }
NULL_GPU_API int cublasGemmEx(Handle* handle) { return product(handle); }
NULL_GPU_API int cublasSgemv_v2(Handle* handle) { return product(handle); }
NULL_GPU_API int cublasSgemmStridedBatched(Handle* handle) { return product(handle); }
NULL_GPU_API int cublasDgemmStridedBatched(Handle* handle) { return product(handle); }
NULL_GPU_API int cublasGemmStridedBatchedEx(Handle* handle) { return product(handle); }

NULL_GPU_API size_t cublasLtGetVersion() { return 130100; }
NULL_GPU_API int cublasLtMatmulDescCreate(void** descriptor, int, int) {
  return created(descriptor);
}
NULL_GPU_API int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t) { return 0; }
NULL_GPU_API int cublasLtMatmulDescDestroy(void*) { return 0; }
NULL_GPU_API int cublasLtMatrixLayoutCreate(void** layout, int, uint64_t, uint64_t, int64_t) {
  return created(layout);
}
NULL_GPU_API int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t) { return 0; }
NULL_GPU_API int cublasLtMatrixLayoutDestroy(void*) { return 0; }
NULL_GPU_API int cublasLtMatmulPreferenceCreate(void** preference) { return created(preference); }
NULL_GPU_API int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return 0; }
NULL_GPU_API int cublasLtMatmulPreferenceDestroy(void*) { return 0; }
NULL_GPU_API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*,
                                                int, void*, int* found) {
  return *found = 1, 0;
}
NULL_GPU_API int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*,
                                const void*, const void*, void*, void*, void*, const void*, void*,
                                size_t, void* stream) {
  return work(stream, kProducts), 0;
}
