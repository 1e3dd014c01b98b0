// Stands in for csrc/cuda/epilogue.cuh and only stores: with it the fused projection is a plain
// GEMM, which the test of its machine code must not take for more.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/projection.h"
#include "cuda/tile.cuh"

namespace rope_fused::cuda {

template <class T, int kDim, bool kPlain>
struct Epilogue {
  using Shape = Tile<kDim>;

  const ProjectCall& call;
  const ProjectedHeads& operand;
  const PairPlace* places;
  char* staged;
  const int warp, lane;

  ROPE_FUSED_DEVICE void finish(const float (&sums)[Shape::kSums], int row, int head) const {
    if (lane == 0) hopper::wait_for_stores();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Shape::kSums; i += 2) {
      const int at = Shape::box_of(fragment_column(lane, i)) ^ Shape::swizzle_of(lane / 4);
      *reinterpret_cast<uint32_t*>(staged + at + Shape::row_at(fragment_row(0, lane, i))) =
          packed<T>(sums[i], sums[i + 1]);
    }
    hopper::fence_before_stores();
    __syncwarp();
    if (lane != 0) return;
    for (int box = 0; box < Shape::kBoxes; ++box) {
      hopper::store_box(operand.result, staged + box * Shape::kBoxBytes,
                        head * kDim + box * Shape::kBoxColumns, row + 16 * warp);
    }
    hopper::commit_stores();
  }
};

}  // namespace rope_fused::cuda
