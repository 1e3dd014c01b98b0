// The maths of one pair on given tables. Include it behind every `rounded` that it is to see.
#pragma once

#include "numbers.h"
#include "rotate.h"

#ifdef ROPE_FUSED_ISA
namespace ROPE_FUSED_ISA {
#endif

// transformers' arithmetic: x * cos + rotate_half(x) * sin, rounded to T after every product and
// sum. rotate_half gives -b to a and a to b; its adjoint (kTranspose) gives b's product to a, -a's
// to b.
template <class T, bool kTranspose, class N>
ROPE_FUSED_INLINE Pair<N> table_pair(N a, N b, N cos_a, N cos_b, N sin_a, N sin_b) {
  if constexpr (kTranspose) {
    return {rounded<T>(a * cos_a) + rounded<T>(b * sin_b),
            rounded<T>(b * cos_b) - rounded<T>(a * sin_a)};
  } else {
    return {rounded<T>(a * cos_a) - rounded<T>(b * sin_a),
            rounded<T>(b * cos_b) + rounded<T>(a * sin_b)};
  }
}

#ifdef ROPE_FUSED_ISA
}  // namespace ROPE_FUSED_ISA
#endif
