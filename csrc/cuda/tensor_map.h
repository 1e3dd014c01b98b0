// Descriptions of tensors for the TMA unit, made by the driver, which is looked for when it is
// needed: nothing links to it.
#pragma once

#include <cuda.h>

#include "cuda/launch.h"

namespace rope_fused::cuda {

// Of 16-bit numbers. Strides are in elements; what a box has beyond a tensor reads as 0 and is not
// written.
class TensorMaps {
 public:
  explicit TensorMaps(bool brain)
      : type_(brain ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "find the driver");
    if (function == nullptr || found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(
          "rope_fused's fused projection needs a driver for CUDA 12 or newer: use "
          "backend='triton'");
    }
    encode_ = reinterpret_cast<decltype(encode_)>(function);
  }

  // Boxes of `tall` rows and `wide` columns, swizzled as wide as they are.
  CUtensorMap rows(const void* data, uint64_t count, uint64_t columns, int64_t step, int tall,
                   int wide) const {
    return make<2>(data, {columns, count}, {step}, {wide, tall});
  }

  // The rows of a weight as [heads, pairs, 2, columns]; `strides` from the two of a pair to heads.
  // A box has all pairs of one head, side by side.
  CUtensorMap pairs(const void* data, uint64_t columns, uint64_t pairs, uint64_t heads,
                    const int64_t (&strides)[3], int wide) const {
    return make<4>(data, {columns, 2, pairs, heads}, strides,
                   {wide, 2, static_cast<int>(pairs), 1});
  }

 private:
  template <int kRank>
  CUtensorMap make(const void* data, const uint64_t (&sizes)[kRank],
                   const int64_t (&strides)[kRank - 1], const int (&box)[kRank]) const {
    uint64_t bytes[kRank - 1];
    uint32_t boxed[kRank], each[kRank];
    for (int i = 0; i < kRank; ++i) {
      boxed[i] = static_cast<uint32_t>(box[i]);
      each[i] = 1;
      if (i > 0) bytes[i - 1] = 2 * static_cast<uint64_t>(strides[i - 1]);
    }
    const auto swizzle = box[0] == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                         : box[0] == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                        : CU_TENSOR_MAP_SWIZZLE_32B;
    CUtensorMap map;
    const CUresult result =
        encode_(&map, type_, kRank, const_cast<void*>(data), sizes, bytes, boxed, each,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
      throw std::runtime_error("rope_fused cannot describe a tensor to the TMA unit: CUDA error " +
                               std::to_string(result));
    }
    return map;
  }

  CUtensorMapDataType type_;
  decltype(&cuTensorMapEncodeTiled) encode_ = nullptr;
};

}  // namespace rope_fused::cuda
