// What the forward and backward kernels share: addressing, angles of a token, RMSNorm statistics,
// type dispatch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "params.h"
#include "rotate.h"

#define INLINE_MEMBER inline __attribute__((always_inline))

// Iterations are independent even when input and output are the same memory (each pair is read
// before it is written).
#if defined(__clang__)
#define VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define VECTORIZE _Pragma("GCC ivdep")
#endif

namespace ROPE_FUSED_ISA {

using rope_fused::DType;
using rope_fused::kMaxPairs;
using rope_fused::Rotation;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Index of element i of a row whose elements are `step` apart; a constant 1 when kUnit, so that
// loops vectorise.
template <bool kUnit>
struct Slots {
  int64_t step;
  __attribute__((always_inline)) int64_t operator()(int64_t i) const {
    return kUnit ? i : i * step;
  }
};

INLINE int64_t position_of(const Rotation& r, int64_t axis, int64_t b, int64_t t) {
  if (r.positions == nullptr) return t;
  const int64_t at =
      axis * r.position_stride[0] + b * r.position_stride[1] + t * r.position_stride[2];
  return r.positions_int64 ? static_cast<const int64_t*>(r.positions)[at]
                           : static_cast<const int32_t*>(r.positions)[at];
}

INLINE int64_t table_row(const Rotation& r, int64_t b, int64_t t) {
  if (r.table_index == nullptr) return 0;
  const int64_t row = r.table_index[b * r.table_index_stride[0] + t * r.table_index_stride[1]];
  return row < 0 ? 0 : least(row, r.tables - 1);
}

template <class A>
INLINE A token_scale_of(const Rotation& r, int64_t b, int64_t t) {
  if (r.token_scale == nullptr) return A(1);
  return static_cast<const A*>(
      r.token_scale)[b * r.token_scale_stride[0] + t * r.token_scale_stride[1]];
}

// The attention factors of a table row in the compute type, converted again only when the row
// changes.
template <class A>
struct Factors {
  int64_t row = -1;
  alignas(64) A of_pair[kMaxPairs];

  INLINE_MEMBER const A* at(const Rotation& r, int64_t wanted) {
    if (wanted != row) {
      row = wanted;
      for (int64_t j = 0; j < r.pairs; ++j) of_pair[j] = static_cast<A>(r.scale[row * r.pairs + j]);
    }
    return of_pair;
  }
};

// cos and sin of every pair of a token times factor[j] (null: 1), the sine negated for the
// conjugate.
template <class A>
INLINE void angles_of_token(const Rotation& r, int64_t b, int64_t t, const A* factor, A* cos,
                            A* sin) {
  const int64_t* turns = r.turns + table_row(r, b, t) * r.pairs;
  const A sign = r.conjugate ? A(-1) : A(1);
  const int64_t position = r.axis_map == nullptr ? position_of(r, 0, b, t) : 0;
  int64_t j = 0;
  if constexpr (sizeof(A) == sizeof(float)) {
    for (; r.axis_map == nullptr && j + kLanes<A> <= r.pairs; j += kLanes<A>) {
      const CosSin<Vector<A>> turned = cos_sin<Lanes>(phases(position, turns + j));
      const Vector<A> scale = factor == nullptr ? Vector<A>{} + A(1) : read<Vector<A>>(factor + j);
      write(cos + j, turned.cos * scale);
      write(sin + j, turned.sin * (sign * scale));
    }
  }
  for (; j < r.pairs; ++j) {
    const int64_t p = r.axis_map == nullptr ? position : position_of(r, r.axis_map[j], b, t);
    const CosSin<A> turned = cos_sin_at<A>(p, static_cast<uint64_t>(turns[j]));
    const A scale = factor == nullptr ? A(1) : factor[j];
    cos[j] = turned.cos * scale;
    sin[j] = turned.sin * (sign * scale);
  }
}

// 1 / sqrt(mean(x^2) + eps) over `heads` heads. Lane sums, so the order of addition depends on the
// vector width alone.
template <class T, bool kUnit, class A = typename Compute<T>::type>
INLINE A rstd_of(const Rotation& r, const T* x, int64_t x_head, int64_t x_step, int64_t heads) {
  const Slots<kUnit> in{x_step};
  Vector<A> lanes{};
  A sum = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const T* row = x + h * x_head;
    int64_t d = 0;
    if constexpr (kUnit) {
      for (; d + kLanes<A> <= r.head_dim; d += kLanes<A>) {
        const Vector<A> value = Packed<T>::load(row + d);
        lanes += value * value;
      }
    }
    for (; d < r.head_dim; ++d) {
      const A value = load(row[in(d)]);
      sum += value * value;
    }
  }
  for (int i = 0; i < kLanes<A>; ++i) sum += lanes[i];
  const A mean = sum / static_cast<A>(heads * r.head_dim);
  return A(1) / static_cast<A>(__builtin_sqrt(static_cast<double>(mean) + r.norm_eps));
}

template <class F>
INLINE void with_type(DType dtype, const F& run) {
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

// run(std::true_type or std::false_type for each flag): run-time flags as compile-time constants.
template <class F>
INLINE void with_flags(const F& run) {
  run();
}
template <class F, class... Rest>
INLINE void with_flags(const F& run, bool flag, Rest... rest) {
  if (flag) {
    with_flags([&](auto... more) { run(std::true_type{}, more...); }, rest...);
  } else {
    with_flags([&](auto... more) { run(std::false_type{}, more...); }, rest...);
  }
}

}  // namespace ROPE_FUSED_ISA
