// Stands in for CUDA where tests compile the kernels for the host: the language and the few calls
// of the runtime that csrc/cuda uses.
//
// Blocks run one after the other, in an order that changes from launch to launch. The threads of a
// block are coroutines, also in changing order: each runs until it ends or waits for others, so
// barriers and shuffles do what they do on a GPU, and a kernel in which not every thread gets to
// them is caught.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

constexpr size_t kStack = 1 << 16;

struct Block {
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  std::vector<uint64_t> exchanged;  // what each thread has put into the shuffle under way
  Barrier all;
  ucontext_t scheduler;
  unsigned current = 0;
  bool progress = false;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
};

inline Block* block = nullptr;
inline std::mt19937 order;
inline bool capturing = false;
inline int device = -1;

inline void wait(Barrier& barrier, unsigned threads) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    block->progress = true;
    return;
  }
  while (barrier.generation == generation) {
    swapcontext(&block->threads[block->current].context, &block->scheduler);
  }
}

inline void enter() {
  block->body(block->argument);
  block->threads[block->current].done = true;
  block->progress = true;
  swapcontext(&block->threads[block->current].context, &block->scheduler);
}

inline std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  std::shuffle(numbers.begin(), numbers.end(), order);
  return numbers;
}

inline void run_block(Block& here) {
  const auto count = static_cast<unsigned>(here.threads.size());
  for (Thread& thread : here.threads) {
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  here.all = {};
  here.warps.assign((count + 31) / 32, {});
  const std::vector<unsigned> turn = shuffled(count);
  for (unsigned left = count; left > 0;) {
    here.progress = false;
    for (unsigned thread : turn) {
      if (here.threads[thread].done) continue;
      here.current = thread;
      threadIdx = dim3(thread, 0, 0);
      swapcontext(&here.scheduler, &here.threads[thread].context);
      left -= here.threads[thread].done;
    }
    if (!here.progress) throw std::logic_error("threads wait for others that never come");
  }
}

template <class Call>
void run(void (*kernel)(Call), dim3 grid, dim3 threads, const Call& call) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  struct Launch {
    void (*kernel)(Call);
    const Call& call;
  } launch{kernel, call};
  Block here;
  here.threads.resize(threads.x);
  here.exchanged.resize(threads.x);
  here.argument = &launch;
  here.body = [](const void* argument) {
    const Launch& what = *static_cast<const Launch*>(argument);
    what.kernel(what.call);
  };
  block = &here;
  blockDim = threads;
  gridDim = grid;
  for (unsigned index : shuffled(grid.x * grid.y)) {
    blockIdx = dim3(index % grid.x, index / grid.x, 0);
    run_block(here);
  }
  block = nullptr;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block->all, blockDim.x); }

template <class A>
A __shfl_xor_sync(unsigned mask, A value, int step) {
  static_assert(sizeof(A) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) throw std::logic_error("a shuffle must name the whole warp");
  emulation::Block& block = *emulation::block;
  const unsigned thread = block.current, warp = thread / 32;
  const unsigned size = std::min(32u, blockDim.x - warp * 32);
  std::memcpy(&block.exchanged[thread], &value, sizeof value);
  emulation::wait(block.warps[warp], size);
  std::memcpy(&value, &block.exchanged[thread ^ static_cast<unsigned>(step)], sizeof value);
  emulation::wait(block.warps[warp], size);
  return value;
}

enum cudaError_t {
  cudaSuccess,
  cudaErrorNoDevice,
  cudaErrorInsufficientDriver,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidConfiguration,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = struct EmulatedStream*;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaSetDevice(int device) {
  emulation::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

template <class Call>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Call),
                               const Call& call) {
  const dim3 grid = config->gridDim, threads = config->blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || threads.x == 0 || threads.x > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  static_assert(sizeof(Call) <= 4096, "parameters of a kernel");
  emulation::run(kernel, grid, threads, call);
  return cudaSuccess;
}
