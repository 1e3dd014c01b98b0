// How lanes share a head: each holds one column of it, kWidth pairs, in registers.
//
// Where strides and alignment allow, a column is two 16-byte vectors half the rotated slice apart:
// the two members of kWidth half-split pairs, or kWidth / 2 interleaved pairs in each. Elsewhere
// its elements are read one by one, those of neighbouring lanes side by side. Dimensions that are
// not rotated are further columns behind.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "numbers.h"
#include "params.h"
#include "rotate.h"

namespace rope_fused::cuda {

constexpr int kThreads = 128;     // of a block, unless a head has more columns
constexpr int kMaxThreads = 256;  // so that 255 registers are left for each

enum class Access { kHalfSplit, kInterleaved, kElements };

template <class T>
using ComputeType = typename Compute<T>::type;

template <class T>
constexpr int kWidth = sizeof(T) == 2 ? 8 : 4;

// Heads that a lane reads before it works on the first one.
template <Access kAccess>
constexpr int kFlight = kAccess == Access::kElements ? 1 : 4;

// Columns of a head, and the lanes that hold them: a power of two, the rest idle.
struct Columns {
  int32_t head_dim, pairs, offset;
  int32_t rotated, total;  // columns: the first `rotated` ones hold pairs
  int32_t lanes;
  bool interleaved;
};

struct alignas(16) Words {
  uint32_t word[4];
};

ROPE_FUSED_DEVICE void widen(const Words& w, BFloat16, float (&value)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = from_bits(w.word[i] << 16);
    value[2 * i + 1] = from_bits(w.word[i] & 0xffff0000u);
  }
}
ROPE_FUSED_DEVICE void widen(const Words& w, Float16, float (&value)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = load(Float16{static_cast<uint16_t>(w.word[i])});
    value[2 * i + 1] = load(Float16{static_cast<uint16_t>(w.word[i] >> 16)});
  }
}
ROPE_FUSED_DEVICE void widen(const Words& w, float, float (&value)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] = from_bits(w.word[i]);
}

template <class T>
ROPE_FUSED_DEVICE uint32_t packed(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (sizeof(T) == sizeof(BFloat16) && T::kBrain) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  T a, b;
  store(a, low);
  store(b, high);
  return a.bits | uint32_t{b.bits} << 16;
#endif
}
template <class T>
ROPE_FUSED_DEVICE Words narrow(T, const float (&value)[8]) {
  Words w;
#pragma unroll
  for (int i = 0; i < 4; ++i) w.word[i] = packed<T>(value[2 * i], value[2 * i + 1]);
  return w;
}
ROPE_FUSED_DEVICE Words narrow(float, const float (&value)[4]) {
  Words w;
#pragma unroll
  for (int i = 0; i < 4; ++i) w.word[i] = to_bits(value[i]);
  return w;
}

// What a lane read of one head, as it is in memory.
template <class T, Access kAccess>
struct Raw {
  Words low, high;
};
template <class T>
struct Raw<T, Access::kElements> {
  T a[kWidth<T>], b[kWidth<T>];
};

// The members of a lane's pairs, in the type of the arithmetic; elsewhere just its elements.
template <class T>
struct Values {
  ComputeType<T> a[kWidth<T>], b[kWidth<T>];
};

template <class T, Access kAccess>
struct Column {
  static constexpr int kCount = kWidth<T>;
  using A = ComputeType<T>;

  const Columns& all;
  int index;
  bool live, rotated;
  int low, high;  // where its vectors start in the head
  bool has_high;

  ROPE_FUSED_DEVICE Column(const Columns& all, int lane, bool token)
      : all(all), index(lane), live(token && lane < all.total), rotated(lane < all.rotated) {
    if constexpr (kAccess != Access::kElements) {
      const int rest = all.head_dim - 2 * all.pairs, first = 2 * (index - all.rotated) * kCount;
      low = rotated ? all.offset + index * kCount : outside(first);
      high = rotated ? low + all.pairs : outside(first + kCount);
      has_high = live && (rotated || first + kCount < rest);
    }
  }

  // The dimension of element e of those that are not rotated.
  ROPE_FUSED_DEVICE int outside(int e) const { return e < all.offset ? e : e + 2 * all.pairs; }

  // The pair of a[i] and b[i].
  ROPE_FUSED_DEVICE int pair(int i) const {
    if constexpr (kAccess == Access::kHalfSplit) return index * kCount + i;
    if constexpr (kAccess == Access::kElements) return index + i * all.rotated;
    const int half = kCount / 2;
    return i < half ? index * half + i : (all.pairs + index * kCount) / 2 + i - half;
  }

  // The dimensions of a[i] and b[i].
  ROPE_FUSED_DEVICE int dim_a(int i) const {
    if constexpr (kAccess == Access::kHalfSplit) return low + i;
    if constexpr (kAccess == Access::kInterleaved) {
      return i < kCount / 2 ? low + 2 * i : high + 2 * i - kCount;
    }
    if (rotated) return all.offset + (all.interleaved ? 2 * pair(i) : pair(i));
    return outside(spare(2 * i));
  }
  ROPE_FUSED_DEVICE int dim_b(int i) const {
    if constexpr (kAccess == Access::kHalfSplit) return high + i;
    if constexpr (kAccess == Access::kInterleaved) return dim_a(i) + 1;
    if (rotated) return dim_a(i) + (all.interleaved ? 1 : all.pairs);
    return outside(spare(2 * i + 1));
  }

  // Whether a[i] and b[i] exist.
  ROPE_FUSED_DEVICE bool has_a(int i) const {
    if constexpr (kAccess == Access::kHalfSplit) return live;
    if constexpr (kAccess == Access::kInterleaved) return i < kCount / 2 ? live : has_high;
    return live && (rotated ? pair(i) < all.pairs : spare(2 * i) < all.head_dim - 2 * all.pairs);
  }
  ROPE_FUSED_DEVICE bool has_b(int i) const {
    if constexpr (kAccess == Access::kHalfSplit) return has_high;
    if constexpr (kAccess == Access::kInterleaved) return has_a(i);
    if (rotated) return has_a(i);
    return live && spare(2 * i + 1) < all.head_dim - 2 * all.pairs;
  }

  ROPE_FUSED_DEVICE Raw<T, kAccess> read(const T* head, int64_t step) const {
    Raw<T, kAccess> raw{};
    if constexpr (kAccess != Access::kElements) {
      if (live) raw.low = *reinterpret_cast<const Words*>(head + low);
      if (has_high) raw.high = *reinterpret_cast<const Words*>(head + high);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (has_a(i)) raw.a[i] = head[dim_a(i) * step];
        if (has_b(i)) raw.b[i] = head[dim_b(i) * step];
      }
    }
    return raw;
  }

  ROPE_FUSED_DEVICE void write(T* head, int64_t step, const Raw<T, kAccess>& raw) const {
    if constexpr (kAccess != Access::kElements) {
      if (live) *reinterpret_cast<Words*>(head + low) = raw.low;
      if (has_high) *reinterpret_cast<Words*>(head + high) = raw.high;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (has_a(i)) head[dim_a(i) * step] = raw.a[i];
        if (has_b(i)) head[dim_b(i) * step] = raw.b[i];
      }
    }
  }

  ROPE_FUSED_DEVICE static Values<T> unpack(const Raw<T, kAccess>& raw) {
    Values<T> x;
    if constexpr (kAccess == Access::kHalfSplit) {
      widen(raw.low, T{}, x.a);
      widen(raw.high, T{}, x.b);
    } else if constexpr (kAccess == Access::kInterleaved) {
      A low[kCount], high[kCount];
      widen(raw.low, T{}, low);
      widen(raw.high, T{}, high);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int at = 2 * i % kCount;
        x.a[i] = 2 * i < kCount ? low[at] : high[at];
        x.b[i] = 2 * i < kCount ? low[at + 1] : high[at + 1];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x.a[i] = load(raw.a[i]);
        x.b[i] = load(raw.b[i]);
      }
    }
    return x;
  }

  ROPE_FUSED_DEVICE static Raw<T, kAccess> pack(const Values<T>& y) {
    Raw<T, kAccess> raw;
    if constexpr (kAccess == Access::kHalfSplit) {
      raw.low = narrow(T{}, y.a);
      raw.high = narrow(T{}, y.b);
    } else if constexpr (kAccess == Access::kInterleaved) {
      A low[kCount], high[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        A(&half)[kCount] = 2 * i < kCount ? low : high;
        half[2 * i % kCount] = y.a[i];
        half[2 * i % kCount + 1] = y.b[i];
      }
      raw.low = narrow(T{}, low);
      raw.high = narrow(T{}, high);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        store(raw.a[i], y.a[i]);
        store(raw.b[i], y.b[i]);
      }
    }
    return raw;
  }

 private:
  // Number k of this lane's dimensions that are not rotated.
  ROPE_FUSED_DEVICE int spare(int k) const {
    return index - all.rotated + k * (all.total - all.rotated);
  }
};

// The heads of one slice of a token.
struct HeadRange {
  int64_t first, last;

  ROPE_FUSED_DEVICE HeadRange(int64_t heads, int slices) {
    const int64_t share = (heads + slices - 1) / slices;
    first = blockIdx.y * share;
    last = first + share < heads ? first + share : heads;
  }
};

// The token of a group of lanes: `index` of all, row b of the batch, t in it.
struct TokenAt {
  int64_t index, b, t;
  bool live;
};
ROPE_FUSED_DEVICE TokenAt token_at(int64_t index, int64_t count, int64_t seqlen) {
  TokenAt token{index, 0, 0, index < count};
  if (!token.live) return token;
  if (count <= INT32_MAX) {  // a 64-bit division costs four times as much
    token.b = static_cast<uint32_t>(index) / static_cast<uint32_t>(seqlen);
  } else {
    token.b = index / seqlen;
  }
  token.t = index - token.b * seqlen;
  return token;
}

ROPE_FUSED_DEVICE int64_t position_of(const Rotation& r, int64_t axis, const TokenAt& token) {
  if (r.positions == nullptr) return token.t;
  const int64_t at =
      axis * r.position_stride[0] + token.b * r.position_stride[1] + token.t * r.position_stride[2];
  return r.positions_int64 ? static_cast<const int64_t*>(r.positions)[at]
                           : static_cast<const int32_t*>(r.positions)[at];
}

ROPE_FUSED_DEVICE int64_t table_row(const Rotation& r, const TokenAt& token) {
  if (r.table_index == nullptr) return 0;
  const int64_t row =
      r.table_index[token.b * r.table_index_stride[0] + token.t * r.table_index_stride[1]];
  return row < 0 ? 0 : row < r.tables ? row : r.tables - 1;
}

template <class A>
ROPE_FUSED_DEVICE A token_scale_of(const Rotation& r, const TokenAt& token) {
  return static_cast<const A*>(
      r.token_scale)[token.b * r.token_scale_stride[0] + token.t * r.token_scale_stride[1]];
}

// cos and sin of a lane's pairs, the sine negated for the conjugate, and their attention factors.
template <class T>
struct Angles {
  ComputeType<T> cos[kWidth<T>], sin[kWidth<T>], scale[kWidth<T>];
};
template <class T, Access kAccess>
ROPE_FUSED_DEVICE void find_angles(const Rotation& r, const Column<T, kAccess>& column,
                                   const TokenAt& token, Angles<T>& angles) {
  using A = ComputeType<T>;
  if (!column.live || !column.rotated) return;
  const int64_t row = table_row(r, token) * r.pairs;
  const int64_t position = r.axis_map == nullptr ? position_of(r, 0, token) : 0;
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {
    if (!column.has_a(i)) continue;
    const int64_t j = column.pair(i);
    const int64_t p = r.axis_map == nullptr ? position : position_of(r, r.axis_map[j], token);
    const CosSin<A> turned = cos_sin_at<A>(p, static_cast<uint64_t>(r.turns[row + j]));
    angles.cos[i] = turned.cos;
    angles.sin[i] = r.conjugate ? -turned.sin : turned.sin;
    angles.scale[i] = static_cast<A>(r.scale[row + j]);
  }
}

// The norm weights of a lane's elements.
template <class T, Access kAccess>
ROPE_FUSED_DEVICE void read_weights(const Column<T, kAccess>& column, const void* norm,
                                    int64_t first, Values<T>& weight) {
  const auto* from = static_cast<const ComputeType<T>*>(norm) + first;
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {
    weight.a[i] = column.has_a(i) ? from[column.dim_a(i)] : 0;
    weight.b[i] = column.has_b(i) ? from[column.dim_b(i)] : 0;
  }
}

// The sum over the lanes of a group, the same in each and in every run. Every thread of the block
// takes part.
template <class A>
ROPE_FUSED_DEVICE A group_sum(A value, int lanes) {
  const int within = lanes < 32 ? lanes : 32;
  for (int step = within / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  if (lanes <= 32) return value;
  __shared__ A of_warp[kMaxThreads / 32];
  __syncthreads();  // an earlier sum has been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const int first = threadIdx.x / lanes * (lanes / 32);
  value = 0;
  for (int warp = 0; warp < lanes / 32; ++warp) value += of_warp[first + warp];
  return value;
}

}  // namespace rope_fused::cuda
