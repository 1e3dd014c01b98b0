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

// Of the fused projection, which takes bfloat16 and float16 on sm_90a.
constexpr int kProjectedHeadDims[] = {64, 80, 96, 128, 192, 256};

// Where the backward adds up. The order of every sum follows from sizes alone.
struct Sums {
  void* per_token;  // workspace [tile, width] of the compute type; width: pairs of inv_freq and of
                    // scale, then the norm weights of q and of k
  int64_t tile;     // tokens at a time
  double* partial;  // [chunks, tables * pairs, again, norm weights], zeros
  int64_t chunks;
  double* token_scale;  // [batch, seqlen], written where q has one
};

void rotate(const Rotation& rotation, const Rows* rows, int count, const Stream& stream);
void rotate_backward(const Rotation& rotation, const RowsBackward* rows, int count,
                     const Sums& sums, const Stream& stream);
void rotate_tables(const TableRotation& rotation, const Rows* rows, int count,
                   const Stream& stream);
void project(const Projection& projection, const Rotation& rotation, const Stream& stream);

}  // namespace rope_fused::cuda
