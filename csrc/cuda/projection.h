// Parameters of the fused projection's kernel.
#pragma once

#include <cuda.h>

#include "cuda/tile.cuh"

namespace rope_fused::cuda {

// One of q, k, v, as TMA and the epilogue see it.
struct ProjectedHeads {
  CUtensorMap weight[2];  // the rotated dimensions of each head, and the others if there are any
  CUtensorMap result, kept;
  const void* bias;
  const void* norm;
  int heads;
  int tiles;  // of columns, together with those before it
  bool turned, token_scaled, keeps;
};

struct ProjectCall {
  CUtensorMap x;
  ProjectedHeads operands[3];
  Rotation rotation;
  HeadPairs pairs;
  int tokens, steps;  // rows of x, and how often kDepth columns of it
  int tall, wide;     // tiles of rows, and pairs of tiles of columns
};

}  // namespace rope_fused::cuda
