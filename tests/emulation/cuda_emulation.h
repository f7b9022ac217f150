// Executes CUDA kernels on the CPU, for tests: a .cu compiled as C++ with -DREVK_EMULATE and this
// header's folder on the include path runs its grid block by block.
//
// A block's threads are fibers, switched at barriers. Between two barriers they run one after
// another, in order or in reverse, so a missing barrier changes the result: shared memory starts as
// NaN. What hardware leaves undefined is an error here: a barrier that not every thread reaches, or
// at different places, unaligned vectors, and writes beyond the shared memory that the launch asked
// for.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

namespace emulation {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xff;  // a NaN in every format

struct Fiber {
  ucontext_t beginning;
  jmp_buf place;
  std::unique_ptr<char[]> stack;  // made at first use; the fiber then serves block after block
  bool started = false, done = false;
  const char* file = nullptr;  // the barrier it waits at
  int line = 0;
};

// One launch at a time: fibers share the thread.
struct Device {
  Fiber fibers[kMaxThreads];
  ucontext_t scheduler;
  jmp_buf scheduler_place;
  unsigned char* shared = nullptr;
  const std::function<void()>* kernel = nullptr;
  unsigned running = 0;
  bool reverse = false;
  std::string error;
  dim3 thread{}, block{}, block_dim{}, grid_dim{};
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

inline Device device;

// Switches between the scheduler and the running fiber. AddressSanitizer has to be told, and takes
// _longjmp for the end of a function; swapcontext makes two system calls a switch.
#if defined(__SANITIZE_ADDRESS__)
inline void enter(Fiber& fiber) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&device.scheduler, &fiber.beginning);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

inline void entered() {
  __sanitizer_finish_switch_fiber(nullptr, &device.scheduler_stack, &device.scheduler_stack_bytes);
}

inline void leave(Fiber& fiber) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, device.scheduler_stack, device.scheduler_stack_bytes);
  swapcontext(&fiber.beginning, &device.scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, &device.scheduler_stack,
                                  &device.scheduler_stack_bytes);
}
#else
inline void enter(Fiber& fiber) {
  if (_setjmp(device.scheduler_place) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.beginning);
}

inline void entered() {}

inline void leave(Fiber& fiber) {
  if (_setjmp(fiber.place) == 0) _longjmp(device.scheduler_place, 1);
}
#endif

inline void run_fiber() {
  entered();
  Fiber& fiber = device.fibers[device.running];
  for (;;) {
    (*device.kernel)();
    fiber.done = true;
    leave(fiber);
  }
}

inline void resume(unsigned index) {
  Fiber& fiber = device.fibers[index];
  device.running = index;
  device.thread = {index, 0, 0};
  if (!fiber.stack) {
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
    fiber.beginning.uc_stack.ss_size = kStackBytes;
    fiber.beginning.uc_link = nullptr;
    makecontext(&fiber.beginning, run_fiber, 0);
  }
  enter(fiber);
}

inline void barrier(const char* file, int line) {
  Fiber& fiber = device.fibers[device.running];
  fiber.file = file;
  fiber.line = line;
  leave(fiber);
}

inline void fail(const std::string& what) {
  if (device.error.empty()) {
    device.error = what + " (block " + std::to_string(device.block.x) + ", thread " +
                   std::to_string(device.thread.x) + ")";
  }
}

inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail("unaligned " + std::to_string(bytes) + "-byte access");
    throw std::runtime_error(device.error);
  }
}

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) device.fibers[i].done = false;
  for (unsigned waiting = threads; waiting > 0;) {
    for (unsigned i = 0; i < threads; ++i) {
      resume(device.reverse ? threads - 1 - i : i);
      if (!device.error.empty()) return;
    }
    waiting = 0;
    const Fiber& first = device.fibers[0];
    for (unsigned i = 0; i < threads; ++i) {
      const Fiber& fiber = device.fibers[i];
      waiting += !fiber.done;
      device.thread = {i, 0, 0};
      if (fiber.done != first.done) return fail("divergent barrier: some threads have returned");
      if (!fiber.done && (fiber.line != first.line || fiber.file != first.file)) {
        return fail("divergent barrier: lines " + std::to_string(first.line) + " and " +
                    std::to_string(fiber.line));
      }
    }
  }
}

template <class Kernel>
void launch(unsigned blocks, unsigned threads, size_t shared_bytes, const Kernel& kernel) {
  if (!device.error.empty()) return;
  if (threads == 0 || threads > kMaxThreads || shared_bytes > (48 << 10) || blocks > 0x7fffffffu) {
    return fail("invalid launch: " + std::to_string(blocks) + " blocks of " +
                std::to_string(threads) + " threads with " + std::to_string(shared_bytes) +
                " bytes");
  }
#if defined(__SANITIZE_ADDRESS__)
  const size_t guard = 0;  // the sanitizer has its own, on both sides
#else
  const size_t guard = kGuardBytes;
#endif
  const size_t size = (shared_bytes + 15) / 16 * 16 + guard;
  const auto release = [](unsigned char* memory) { std::free(memory); };
  const std::unique_ptr<unsigned char, decltype(release)> shared(
      static_cast<unsigned char*>(std::aligned_alloc(16, size + (size == 0 ? 16 : 0))), release);
  const std::function<void()> run = [&] {
    try {
      kernel();
    } catch (const std::runtime_error&) {  // already recorded; it must not leave the fiber
    }
  };
  device.shared = shared.get();
  device.kernel = &run;
  device.block_dim = {threads, 1, 1};
  device.grid_dim = {blocks, 1, 1};
  for (unsigned block = 0; block < blocks; ++block) {
    device.block = {block, 0, 0};
    std::memset(device.shared, kPoison, size);
    run_block(threads);
    for (size_t i = shared_bytes; i < size; ++i) {
      if (device.shared[i] != kPoison) fail("write beyond the launch's shared memory");
    }
    if (!device.error.empty()) break;
  }
  if (!device.error.empty()) {
    for (Fiber& fiber : device.fibers) fiber = Fiber{};  // they hang somewhere within the kernel
  }
}

}  // namespace emulation

#define threadIdx (emulation::device.thread)
#define blockIdx (emulation::device.block)
#define blockDim (emulation::device.block_dim)
#define gridDim (emulation::device.grid_dim)
#define __syncthreads() emulation::barrier(__FILE__, __LINE__)

#define REVK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulation::launch(grid, block, size_t(shared), [&] { kernel(__VA_ARGS__); })
#define REVK_SHARED(name) unsigned char* const name = emulation::device.shared
#define REVK_CHECK_ALIGNED(pointer, bytes) emulation::check_aligned(pointer, bytes)
