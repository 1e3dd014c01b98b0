// Host side of the element-wise kernels: which accesses tensors allow, and the grid of a launch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/column.cuh"

namespace rope_fused::cuda {

constexpr int64_t kEnoughBlocks = 1024;  // of 128 threads: eight for each processor of an H100
constexpr int64_t kSlice = 4;            // heads of a token that are not worth dividing further

struct Grid {
  Columns columns;
  int64_t tokens;
  int slices;  // of the heads of a token, so that few tokens fill the device too
  int threads;
  bool vectors;

  dim3 blocks() const {
    const int64_t groups = threads / columns.lanes;
    return dim3(static_cast<unsigned>((tokens + groups - 1) / groups), slices);
  }
};

// Whether vectors of `width` elements of T line up in a tensor with these strides.
template <class T>
bool aligned(const void* data, const int64_t (&stride)[4]) {
  constexpr int64_t width = kWidth<T>;
  const bool steps =
      stride[3] == 1 && stride[0] % width == 0 && stride[1] % width == 0 && stride[2] % width == 0;
  return steps && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

template <class T>
bool aligned(const Rows& rows) {
  return aligned<T>(rows.x, rows.x_stride) && aligned<T>(rows.y, rows.y_stride);
}

// What the operands of a launch have in common.
struct Operands {
  bool aligned = true, in_place = true;
  int64_t heads = 0;  // most of one
};
template <class T>
Operands look_at(const Rows* rows, int count) {
  Operands all;
  for (int n = 0; n < count; ++n) {
    all.aligned = all.aligned && aligned<T>(rows[n]);
    all.in_place = all.in_place && rows[n].x == rows[n].y;
    all.heads = std::max(all.heads, rows[n].heads);
  }
  return all;
}

// The grid over the heads of `geometry` (a Rotation or a TableRotation). `rest`: whether the
// dimensions that are not rotated are handled too.
template <class T, class Geometry>
Grid make_grid(const Geometry& geometry, bool vectors, bool rest, int64_t heads, bool slice) {
  constexpr int64_t width = kWidth<T>;
  const int64_t spare = geometry.head_dim - 2 * geometry.pairs;
  Grid grid;
  grid.vectors = sizeof(T) < 8 && vectors && geometry.pairs % width == 0 &&
                 geometry.offset % width == 0 && spare % width == 0;
  grid.tokens = geometry.batch * geometry.seqlen;
  Columns& columns = grid.columns;
  columns.head_dim = static_cast<int32_t>(geometry.head_dim);
  columns.pairs = static_cast<int32_t>(geometry.pairs);
  columns.offset = static_cast<int32_t>(geometry.offset);
  columns.interleaved = geometry.interleaved;
  columns.rotated = static_cast<int32_t>((geometry.pairs + width - 1) / width);
  columns.total = columns.rotated;
  if (rest) columns.total += static_cast<int32_t>((spare + 2 * width - 1) / (2 * width));
  columns.lanes = 1;
  while (columns.lanes < columns.total) columns.lanes *= 2;
  if (columns.lanes > kMaxThreads) {
    throw std::invalid_argument("a head of " + std::to_string(geometry.head_dim) + " dimensions, " +
                                std::to_string(2 * geometry.pairs) +
                                " of them rotated, is too long for the CUDA kernels: use "
                                "backend='auto' or 'reference'");
  }
  grid.threads = std::max(kThreads, columns.lanes);
  grid.slices = 1;
  if (slice) {
    const int64_t most = (heads + kSlice - 1) / kSlice;
    grid.slices = static_cast<int>(std::clamp<int64_t>(
        kEnoughBlocks / std::max(1u, grid.blocks().x), 1, std::max<int64_t>(1, most)));
  }
  return grid;
}

template <auto kKernel, class Call>
void launch(const Grid& grid, const Call& call, const Stream& stream) {
  launch<kKernel>(grid.blocks(), grid.threads, call, stream);
}

template <class F>
void with_type(DType dtype, const F& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat64:
      return run(double{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat16:
      return run(Float16{});
  }
}

template <Access kAccess>
using AccessConstant = std::integral_constant<Access, kAccess>;

// run(how lanes read a head, as a constant). float64 has no vectors: it is for checking.
template <class T, class F>
void with_access(const Grid& grid, const F& run) {
  if constexpr (sizeof(T) < 8) {
    if (grid.vectors && grid.columns.interleaved) {
      return run(AccessConstant<Access::kInterleaved>{});
    }
    if (grid.vectors) return run(AccessConstant<Access::kHalfSplit>{});
  }
  run(AccessConstant<Access::kElements>{});
}

}  // namespace rope_fused::cuda
