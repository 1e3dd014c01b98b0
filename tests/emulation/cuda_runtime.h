// Stands in for CUDA where tests compile the kernels for the host: the language and the few calls
// of the runtime that csrc/cuda uses.
//
// Clusters of blocks (mostly of one) run one after the other, in an order that changes from launch
// to launch. The threads of a cluster are coroutines, also in changing order: each runs until it
// ends or waits for others, so barriers and shuffles do what they do on a GPU, and a kernel in
// which not every thread gets to them is caught.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
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

using Work = std::vector<std::function<void()>>;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::function<bool()> ready;  // what it waits for; empty: nothing
  Work products;                // asynchronous ones that are not yet in a group
  std::deque<Work> groups;      // of products, not yet waited for
  unsigned stores = 0;          // asynchronous ones that have not yet happened
};

constexpr size_t kStack = 1 << 16;
constexpr size_t kShared = 227 << 10;

struct Block {
  Barrier all;
  std::vector<Barrier> warps;
  std::unique_ptr<char[]> room;
  char* shared = nullptr;  // dynamic shared memory
};

struct Cluster {
  std::vector<Thread> threads;
  std::vector<uint64_t> exchanged;  // what each thread has put into the shuffle under way
  std::vector<Block> blocks;
  Barrier all;
  Work copies;  // asynchronous ones, which happen at any time
  ucontext_t scheduler;
  unsigned current = 0;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;

  Thread& thread() { return threads[current]; }
  Block& block() { return blocks[current / blockDim.x]; }
  unsigned rank() const { return current / blockDim.x; }
};

inline Cluster* cluster = nullptr;
inline std::mt19937 order;
inline bool capturing = false;
inline int device = -1;

template <class F>
void wait_until(const F& ready) {
  Thread& self = cluster->thread();
  while (!ready()) {
    self.ready = ready;
    swapcontext(&self.context, &cluster->scheduler);
    self.ready = nullptr;
  }
}

inline void wait(Barrier& barrier, unsigned threads) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  wait_until([&barrier, generation] { return barrier.generation != generation; });
}

inline void enter() {
  cluster->body(cluster->argument);
  cluster->thread().done = true;
  swapcontext(&cluster->thread().context, &cluster->scheduler);
}

inline std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  std::shuffle(numbers.begin(), numbers.end(), order);
  return numbers;
}

// Some of the copies under way, in any order; all of them, or at least one.
inline void copy_some(Cluster& here, bool all) {
  std::shuffle(here.copies.begin(), here.copies.end(), order);
  size_t count = here.copies.size();
  if (!all) count = count > 0 ? 1 + order() % count : 0;
  for (; count > 0; --count) {
    const auto copy = std::move(here.copies.back());
    here.copies.pop_back();
    copy();
  }
}

inline void run_cluster(Cluster& here, unsigned index) {
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
  for (Block& block : here.blocks) {
    block.all = {};
    block.warps.assign((blockDim.x + 31) / 32, {});
    if (block.shared != nullptr) std::memset(block.shared, 0xff, kShared);  // numbers that are NaN
  }
  const std::vector<unsigned> turn = shuffled(count);
  const auto blocks = static_cast<unsigned>(here.blocks.size());
  for (unsigned left = count; left > 0;) {
    bool progress = !here.copies.empty();
    if (order() % 2 == 0) copy_some(here, false);
    for (unsigned number : turn) {
      Thread& thread = here.threads[number];
      if (thread.done || (thread.ready && !thread.ready())) continue;
      here.current = number;
      threadIdx = dim3(number % blockDim.x, 0, 0);
      const unsigned block = index * blocks + number / blockDim.x;
      blockIdx = dim3(block % gridDim.x, block / gridDim.x, 0);
      swapcontext(&here.scheduler, &thread.context);
      left -= thread.done;
      progress = true;
    }
    if (!progress) throw std::logic_error("threads wait for others that never come");
  }
  copy_some(here, true);
}

template <class Call>
void run(void (*kernel)(Call), dim3 grid, dim3 threads, unsigned blocks, size_t shared,
         const Call& call) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  struct Launch {
    void (*kernel)(Call);
    const Call& call;
  } launch{kernel, call};
  Cluster here;
  here.threads.resize(blocks * threads.x);
  here.exchanged.resize(blocks * threads.x);
  here.blocks.resize(blocks);
  if (shared > 0) {
    for (Block& block : here.blocks) {
      block.room = std::make_unique<char[]>(kShared + 1024);
      const auto address = reinterpret_cast<uintptr_t>(block.room.get());
      block.shared = block.room.get() + (1024 - address % 1024) % 1024;
    }
  }
  here.argument = &launch;
  here.body = [](const void* argument) {
    const Launch& what = *static_cast<const Launch*>(argument);
    what.kernel(what.call);
  };
  cluster = &here;
  blockDim = threads;
  gridDim = grid;
  for (unsigned index : shuffled(grid.x * grid.y / blocks)) run_cluster(here, index);
  cluster = nullptr;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::cluster->block().all, blockDim.x); }

// Those of the threads of a warp that exist.
inline void __syncwarp() {
  const unsigned warp = threadIdx.x / 32;
  emulation::wait(emulation::cluster->block().warps[warp], std::min(32u, blockDim.x - warp * 32));
}

template <class A>
A __shfl_xor_sync(unsigned mask, A value, int step) {
  static_assert(sizeof(A) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) throw std::logic_error("a shuffle must name the whole warp");
  emulation::Cluster& here = *emulation::cluster;
  const unsigned thread = here.current;
  std::memcpy(&here.exchanged[thread], &value, sizeof value);
  __syncwarp();
  std::memcpy(&value, &here.exchanged[thread ^ static_cast<unsigned>(step)], sizeof value);
  __syncwarp();
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
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
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
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int shared) {
  return shared <= static_cast<int>(emulation::kShared) ? cudaSuccess
                                                        : cudaErrorInvalidConfiguration;
}
inline cudaError_t cudaDeviceGetAttribute(int* count, cudaDeviceAttr, int) {
  *count = 7;  // multiprocessors: few, so that each has several tiles of a small problem
  return cudaSuccess;
}

template <class Call>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Call),
                               const Call& call) {
  const dim3 grid = config->gridDim, threads = config->blockDim;
  const unsigned blocks = config->numAttrs > 0 ? config->attrs->val.clusterDim.x : 1;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || threads.x == 0 || threads.x > 1024 ||
      grid.x % blocks != 0) {
    return cudaErrorInvalidConfiguration;
  }
  static_assert(sizeof(Call) <= 4096, "parameters of a kernel");
  emulation::run(kernel, grid, threads, blocks, config->dynamicSmemBytes, call);
  return cudaSuccess;
}
