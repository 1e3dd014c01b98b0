// Stands in for the driver's header: tensor maps, as the emulated TMA unit reads them.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE,
  CU_TENSOR_MAP_SWIZZLE_32B,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
  char* data;
  uint64_t bytes[3];  // from one element of a dimension to the next, from the second dimension on
  uint32_t size[4], box[4];
  uint32_t rank, swizzle;  // chunks of 16 bytes that are exchanged
  char rest[56];
};
static_assert(sizeof(CUtensorMap) == 128);

// The constraints are those of the driver's documentation.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                       void* data, const cuuint64_t* sizes, const cuuint64_t* bytes,
                                       const cuuint32_t* box, const cuuint32_t* steps,
                                       CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  std::memset(map, 0xff, sizeof *map);
  map->data = static_cast<char*>(data);
  map->rank = rank;
  map->swizzle = 1u << swizzle;
  bool good = rank >= 2 && rank <= 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  good = good && 2 * box[0] == 16u << swizzle;
  for (uint32_t i = 0; good && i < rank; ++i) {
    good = sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 &&
           steps[i] == 1;
    map->size[i] = static_cast<uint32_t>(sizes[i]);
    map->box[i] = box[i];
    if (i == 0) continue;
    good = good && bytes[i - 1] % 16 == 0 && bytes[i - 1] < uint64_t{1} << 40;
    map->bytes[i - 1] = bytes[i - 1];
  }
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled") == 0) {
    *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  }
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
