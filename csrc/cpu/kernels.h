// The CPU kernels as a table of functions, one table per instruction set.
#pragma once

#include "params.h"

namespace rope_fused {

struct Kernels {
  const char* isa;
  // large: the outputs are more than caches keep.
  void (*rotate)(const Rotation&, const Rows* rows, int count, bool large);
  void (*rotate_backward)(const Rotation&, const RowsBackward* rows, int count, const FactorGrads&);
  void (*rotate_tables)(const TableRotation&, const Rows* rows, int count);
};

const Kernels& kernels();  // the best that this processor runs

constexpr int64_t kMaxPairs = 1024;  // angles of a block of tokens live on the stack

}  // namespace rope_fused
