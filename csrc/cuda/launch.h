// Launches: on the right device, first uses refused inside a graph capture, errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

#define ROPE_FUSED_DEVICE __device__ __forceinline__

namespace rope_fused::cuda {

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  std::string message =
      std::string("rope_fused cannot ") + doing + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    message +=
        "; backend='cuda' needs an NVIDIA GPU and its driver, use backend='auto' without them";
  } else if (error == cudaErrorNoKernelImageForDevice) {
    message += "; rope_fused was built for " ROPE_FUSED_CUDA_ARCHITECTURES
               ", use backend='triton' on this GPU";
  }
  throw std::runtime_error(message);
}

inline int processors(const Stream& stream) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, stream.device),
        "look at the device");
  return count;
}

// Runs kKernel, in clusters of as many blocks, each with `shared` bytes of dynamic shared memory.
// The caller has made stream.device torch's current one; this copy of the runtime
// only has to follow, and must not restore what it last knew of.
template <auto kKernel, class Call>
void launch(dim3 blocks, int threads, const Call& call, const Stream& stream, int cluster = 1,
            int shared = 0) {
  check(cudaSetDevice(stream.device), "select the device");
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  const auto kernel = reinterpret_cast<const void*>(kKernel);
  static std::atomic<uint64_t> loaded{0};  // one bit for each device
  const uint64_t device = uint64_t{1} << (stream.device % 64);
  if ((loaded.load(std::memory_order_relaxed) & device) == 0) {
    cudaStreamCaptureStatus capturing;
    check(cudaStreamIsCapturing(handle, &capturing), "read the stream's state");
    if (capturing != cudaStreamCaptureStatusNone) {
      throw std::runtime_error(
          "rope_fused cannot load a kernel inside a graph capture: call it once with these kinds "
          "of tensors before the capture");
    }
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "load a kernel");
    if (shared > 0) {
      const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
      check(cudaFuncSetAttribute(kernel, limit, shared), "reserve shared memory");
    }
    loaded.fetch_or(device, std::memory_order_relaxed);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = handle;
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &together;
  config.numAttrs = cluster > 1;
  check(cudaLaunchKernelEx(&config, kKernel, call), "launch a kernel");
}

}  // namespace rope_fused::cuda
