// The state of the GPU that does nothing: what it was asked for, its memory, and stream capture.
#pragma once
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

#define NULL_GPU_API extern "C" __attribute__((visibility("default")))

namespace null_gpu {

// What is counted, per device; COUNTS in __init__.py has the same order.
enum Count {
  kLaunches,
  kDriverLaunches,
  kProducts,
  kCopies,
  kFills,
  kSynchronisations,
  kEvents,
  kAllocations,
  kGraphLaunches,
  kCaptured,
  kCounts
};

constexpr int kMaxDevices = 8;
constexpr size_t kMemory = size_t(80) << 30;
inline std::array<std::array<std::atomic<int64_t>, kCounts>, kMaxDevices> counts;

inline int from_environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}
inline int architecture() {
  static const int value = from_environment("NULL_GPU_ARCH", 90);
  return value;
}
inline int devices() {
  static const int value = from_environment("NULL_GPU_DEVICES", 1);
  return value < kMaxDevices ? value : kMaxDevices;
}
inline thread_local int current = 0;
inline void count(Count what) { ++counts[current][what]; }

// How often each of the runtime's kernels was launched; names are as the compiler mangled them.
struct Kernels {
  std::mutex lock;
  std::unordered_map<const void*, std::pair<const char*, int64_t>>
      found;  // by function: name, launches

  void name(const void* function, const char* name) {
    std::lock_guard<std::mutex> guard(lock);
    found[function] = {name, 0};
  }
  void launched(const void* function) {
    std::lock_guard<std::mutex> guard(lock);
    ++found[function].second;
  }
};
inline Kernels kernels;

// CUDA's last error is kept per thread until it is asked for.
inline thread_local cudaError_t last_error = cudaSuccess;
inline cudaError_t fail(cudaError_t error) { return last_error = error; }

// Memory: of the host, never touched unless it is copied to. Addresses are those of CUDA: 2 MiB
// apart.
struct Memory {
  std::mutex lock;
  std::map<uintptr_t, std::pair<size_t, int>> ranges;  // begin: size, device
  std::array<size_t, kMaxDevices> used{};

  void* allocate(size_t size) {
    constexpr size_t kPage = size_t(2) << 20;
    size = (size + kPage - 1) / kPage * kPage;
    std::lock_guard<std::mutex> guard(lock);
    if (used[current] + size > kMemory) return nullptr;
    void* raw = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return nullptr;
    const uintptr_t begin = (uintptr_t(raw) + kPage - 1) / kPage * kPage;
    munmap(raw, begin - uintptr_t(raw));
    munmap(reinterpret_cast<void*>(begin + size), uintptr_t(raw) + kPage - begin);
    ranges[begin] = {size, current};
    used[current] += size;
    return reinterpret_cast<void*>(begin);
  }
  bool release(void* p) {
    std::lock_guard<std::mutex> guard(lock);
    const auto found = ranges.find(uintptr_t(p));
    if (found == ranges.end()) return false;
    munmap(p, found->second.first);
    used[found->second.second] -= found->second.first;
    ranges.erase(found);
    return true;
  }
  // The device that p lies on, or -1.
  int device_of(const void* p) {
    std::lock_guard<std::mutex> guard(lock);
    auto next = ranges.upper_bound(uintptr_t(p));
    if (next == ranges.begin()) return -1;
    --next;
    return uintptr_t(p) < next->first + next->second.first ? next->second.second : -1;
  }
};
inline Memory memory;

// A graph is the number of its nodes.
struct Graph {
  int64_t nodes = 0;
};
struct Capture {
  unsigned long long id;
  Graph* graph;
  cudaStreamCaptureMode mode;
  const void* thread;  // that began it
  bool invalid = false;
};
using CapturePointer = std::shared_ptr<Capture>;
struct Stream {
  CapturePointer capture;
  bool began = false;
};
struct Event {
  CapturePointer capture;  // in which it was recorded last
};

inline std::mutex capture_lock;
inline std::map<CapturePointer, int> captures;  // under way
inline std::atomic<int> capturing{0};           // their number: nothing is locked while it is 0
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
inline thread_local char this_thread;

inline Stream* stream_of(const void* handle) {
  static std::array<Stream, kMaxDevices> defaults;  // NULL, legacy and per-thread ones
  if (uintptr_t(handle) <= 2) return &defaults[current];
  return static_cast<Stream*>(const_cast<void*>(handle));
}

inline CapturePointer capture_of(const void* stream) {
  if (capturing == 0) return nullptr;
  std::lock_guard<std::mutex> guard(capture_lock);
  Stream* s = stream_of(stream);
  if (s->capture && !captures.count(s->capture)) s->capture = nullptr;  // ended on another stream
  return s->capture;
}

// Work on a stream: a node of the graph that is being captured there, else counted.
inline void work(const void* stream, Count what) {
  if (const CapturePointer capture = capture_of(stream)) {
    ++capture->graph->nodes;
    count(kCaptured);
  } else {
    count(what);
  }
}

// Waiting for a stream that is being captured ends the capture with an error.
inline cudaError_t wait_for(const void* stream) {
  if (const CapturePointer capture = capture_of(stream)) {
    capture->invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

// What may not be called while a capture is under way that sees this thread; relaxed threads may.
inline cudaError_t unsafe() {
  if (capturing == 0 || capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  std::lock_guard<std::mutex> guard(capture_lock);
  cudaError_t error = cudaSuccess;
  for (const auto& entry : captures) {
    const CapturePointer& capture = entry.first;
    const bool own = capture->thread == &this_thread;
    const bool seen = capture->mode == cudaStreamCaptureModeGlobal
                          ? own || capture_mode == cudaStreamCaptureModeGlobal
                          : capture->mode == cudaStreamCaptureModeThreadLocal && own;
    if (seen) {
      capture->invalid = true;
      error = fail(cudaErrorStreamCaptureUnsupported);
    }
  }
  return error;
}

}  // namespace null_gpu
