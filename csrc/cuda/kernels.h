// What the bindings call: each launches on a device's stream and does not wait.
#pragma once

#include "params.h"

namespace rope_fused::cuda {

struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

constexpr int64_t kMaxPairs = 1024;
constexpr int64_t kMaxHeadDim = 2048;  // 256 lanes of at least 4 pairs share a head

void rotate(const Rotation& rotation, const Rows* rows, int count, const Stream& stream);

}  // namespace rope_fused::cuda
