// Vectors of the compute type, in the compilers' own vector extensions: one source for every
// instruction set.
//
// A vector holds consecutive pairs. Half-split rows are loaded as they lie; interleaved rows are
// separated into first and second members on the way in and joined on the way out.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "numbers.h"
#include "rotate.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ROPE_FUSED_ISA {

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class E, int kCount>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * kCount)));
};
template <class A>
using Vector = typename VectorOf<A, kLanes<A>>::type;
using Words = VectorOf<uint32_t, kLanes<float>>::type;
using Halves = VectorOf<uint16_t, kLanes<float>>::type;

template <class V>
INLINE V read(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
template <class V>
INLINE void write(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}
// Past the caches when kStream, so that no line is read only to be overwritten; `to` is aligned
// then.
template <bool kStream, class V>
INLINE void write(void* to, V value) {
#if defined(__AVX512F__)
  if constexpr (kStream && sizeof value == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(to), same_bits<__m512i>(value));
  }
#endif
#if defined(__AVX2__)
  if constexpr (kStream && sizeof value == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to), same_bits<__m256i>(value));
  }
#endif
#if defined(__SSE2__)
  if constexpr (kStream && sizeof value == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(to), same_bits<__m128i>(value));
  }
#endif
  write(to, value);
}
// Streamed writes become visible to other threads in order with those that follow.
INLINE void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
// Which 32-bit half of a 64-bit lane, counted in memory order, is the high one.
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
constexpr int kHighWord = 0;
#else
constexpr int kHighWord = 1;
#endif

INLINE Words choose(Words mask, Words a, Words b) { return (mask & a) | (~mask & b); }

template <class V, int... kIndex>
INLINE V every_other(V low, V high, std::integer_sequence<int, kIndex...>,
                     std::integral_constant<int, 0>) {
  return __builtin_shufflevector(low, high, (2 * kIndex)...);
}
template <class V, int... kIndex>
INLINE V every_other(V low, V high, std::integer_sequence<int, kIndex...>,
                     std::integral_constant<int, 1>) {
  return __builtin_shufflevector(low, high, (2 * kIndex + 1)...);
}
// The low (kHalf = 0) or high half of a and b taken in turns.
template <int kHalf, class V, int... kIndex>
INLINE V joined(V a, V b, std::integer_sequence<int, kIndex...>) {
  constexpr int kCount = sizeof...(kIndex);
  return __builtin_shufflevector(a, b,
                                 (kHalf * kCount / 2 + kIndex / 2 + (kIndex % 2) * kCount)...);
}

// cos_sin of rotate.h on kLanes phases at once.
struct Lanes {
  using Float = Vector<float>;
  using Word = Words;
  INLINE Float from_signed(Word word) {
    return __builtin_convertvector(same_bits<VectorOf<int32_t, kLanes<float>>::type>(word), Float);
  }
};

// phase32 of kLanes consecutive frequencies.
INLINE Words phases(int64_t position, const int64_t* turns) {
  using Longs = VectorOf<uint64_t, kLanes<float> / 2>::type;
  const Longs low = read<Longs>(turns) * static_cast<uint64_t>(position);
  const Longs high = read<Longs>(turns + kLanes<float> / 2) * static_cast<uint64_t>(position);
  return every_other(same_bits<Words>(low), same_bits<Words>(high),
                     std::make_integer_sequence<int, kLanes<float>>{},
                     std::integral_constant<int, kHighWord>{});
}

// How T is stored: load and store kLanes consecutive values, or kLanes adjacent pairs.
template <class T>
struct Packed {  // float, double: stored as computed
  using V = Vector<T>;
  using Index = std::make_integer_sequence<int, kLanes<T>>;
  INLINE V load(const T* x) { return read<V>(x); }
  template <bool kStream>
  INLINE void store(T* y, V value) {
    write<kStream>(y, value);
  }
  INLINE void load_pairs(const T* x, V& a, V& b) {
    const V low = read<V>(x), high = read<V>(x + kLanes<T>);
    a = every_other(low, high, Index{}, std::integral_constant<int, 0>{});
    b = every_other(low, high, Index{}, std::integral_constant<int, 1>{});
  }
  template <bool kStream>
  INLINE void store_pairs(T* y, V a, V b) {
    write<kStream>(y, joined<0>(a, b, Index{}));
    write<kStream>(y + kLanes<T>, joined<1>(a, b, Index{}));
  }
};

// 16-bit types. Bits converts Halves, or the numbers in the low or high halves of Words.
template <class T, class Bits>
struct PackedHalf {
  using V = Vector<float>;
  INLINE V load(const T* x) { return Bits::widen(read<Halves>(x)); }
  template <bool kStream>
  INLINE void store(T* y, V value) {
    write<kStream>(y, Bits::narrow(value));
  }
  INLINE void load_pairs(const T* x, V& a, V& b) {
    const Words both = read<Words>(x);
    a = Bits::widen_low(both);
    b = Bits::widen_high(both);
  }
  template <bool kStream>
  INLINE void store_pairs(T* y, V a, V b) {
    write<kStream>(y, Bits::join(a, b));
  }
};

struct BFloat16Bits {
  INLINE Vector<float> widen_low(Words both) { return same_bits<Vector<float>>(both << 16); }
  INLINE Vector<float> widen_high(Words both) {
    return same_bits<Vector<float>>(both & 0xffff0000u);
  }
  INLINE Vector<float> widen(Halves half) {
    return widen_low(__builtin_convertvector(half, Words));
  }
  // To nearest even, in the upper halves; the lower halves are leftovers. A NaN keeps its upper
  // half, quieted; where its lower half is known to be zero, rounding keeps it as well.
  template <bool kShortNaN = false>
  INLINE Words rounded(Vector<float> value) {
    const Words bits = same_bits<Words>(value);
    const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    if constexpr (kShortNaN) return nearest;
    return choose(same_bits<Words>(value != value), bits | 0x400000u, nearest);
  }
  INLINE Halves narrow(Vector<float> value) {
    return __builtin_convertvector(rounded(value) >> 16, Halves);
  }
  template <bool kShortNaN = false>
  INLINE Words join(Vector<float> low, Vector<float> high) {
    return rounded<kShortNaN>(low) >> 16 | (rounded<kShortNaN>(high) & 0xffff0000u);
  }
};

struct Float16Bits {
  INLINE Vector<float> widen_low(Words both) {
    return widen(__builtin_convertvector(both & 0xffffu, Halves));
  }
  INLINE Vector<float> widen_high(Words both) {
    return widen(__builtin_convertvector(both >> 16, Halves));
  }
  INLINE Words join(Vector<float> low, Vector<float> high) {
    return __builtin_convertvector(narrow(low), Words) |
           __builtin_convertvector(narrow(high), Words) << 16;
  }
#if defined(__AVX512F__)
  INLINE Vector<float> widen(Halves half) { return (Vector<float>)_mm512_cvtph_ps((__m256i)half); }
  INLINE Halves narrow(Vector<float> value) {
    return (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
  }
#elif defined(__F16C__)
  INLINE Vector<float> widen(Halves half) { return (Vector<float>)_mm256_cvtph_ps((__m128i)half); }
  INLINE Halves narrow(Vector<float> value) {
    return (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
  }
#else
  // The conversions of numbers.h on every lane.
  INLINE Vector<float> widen(Halves half) {
    const Words low = __builtin_convertvector(half, Words), magnitude = low & 0x7fffu;
    const Words scaled = same_bits<Words>(same_bits<Vector<float>>(magnitude << 13) * 0x1p112f);
    const Words special = same_bits<Words>(magnitude >= 0x7c00u) & 0x7f800000u;
    return same_bits<Vector<float>>(scaled | special | (low & 0x8000u) << 16);
  }
  INLINE Halves narrow(Vector<float> value) {
    const Words bits = same_bits<Words>(value), magnitude = bits & 0x7fffffffu;
    const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Words subnormal =
        same_bits<Words>(same_bits<Vector<float>>(magnitude) + 0.5f) - 0x3f000000u;
    const Words large =
        choose(same_bits<Words>(magnitude >= 0x477ff000u), Words{} + 0x7c00u, normal);
    const Words finite = choose(same_bits<Words>(magnitude < 0x38800000u), subnormal, large);
    const Words result =
        choose(same_bits<Words>(magnitude > 0x7f800000u), Words{} + 0x7e00u, finite);
    return __builtin_convertvector(result | (bits >> 16 & 0x8000u), Halves);
  }
#endif
};

template <>
struct Packed<BFloat16> : PackedHalf<BFloat16, BFloat16Bits> {};
template <>
struct Packed<Float16> : PackedHalf<Float16, Float16Bits> {};

// Every lane as it would be after a trip through T.
template <class T>
INLINE Vector<float> rounded(Vector<float> value) {
  if constexpr (sizeof(T) == sizeof(float)) return value;
  if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16Bits::widen_high(BFloat16Bits::rounded(value));
  } else if constexpr (std::is_same_v<T, Float16>) {
    return Float16Bits::widen(Float16Bits::narrow(value));
  }
}
template <class T>
INLINE Vector<double> rounded(Vector<double> value) {
  return value;
}

// kParts vectors of first and of second members at a time. Splitting words is cheaper than widening
// halves, so half-split bfloat16 rows come as even and odd columns: tables beside them are put into
// that order once (`arrange`).
template <class T, bool kInterleaved>
struct Members {
  static constexpr int kParts = 1;
  using V = Vector<typename Compute<T>::type>;
  INLINE void load(const T* a, const T* b, V* first, V* second) {
    if constexpr (kInterleaved) {
      Packed<T>::load_pairs(a, *first, *second);
    } else {
      *first = Packed<T>::load(a);
      *second = Packed<T>::load(b);
    }
  }
  template <bool kShortNaN, bool kStream>
  INLINE void store(T* a, T* b, const V* first, const V* second) {
    if constexpr (kInterleaved) {
      Packed<T>::template store_pairs<kStream>(a, *first, *second);
    } else {
      Packed<T>::template store<kStream>(a, *first);
      Packed<T>::template store<kStream>(b, *second);
    }
  }
};
template <>
struct Members<BFloat16, false> {
  static constexpr int kParts = 2;
  using V = Vector<float>;
  INLINE void load(const BFloat16* a, const BFloat16* b, V* first, V* second) {
    Packed<BFloat16>::load_pairs(a, first[0], first[1]);
    Packed<BFloat16>::load_pairs(b, second[0], second[1]);
  }
  template <bool kShortNaN, bool kStream>
  INLINE void store(BFloat16* a, BFloat16* b, const V* first, const V* second) {
    write<kStream>(a, BFloat16Bits::join<kShortNaN>(first[0], first[1]));
    write<kStream>(b, BFloat16Bits::join<kShortNaN>(second[0], second[1]));
  }
};

// kParts vectors of a table in the order of Members<T, kInterleaved>.
template <class T, bool kInterleaved, class A = typename Compute<T>::type>
INLINE void load_arranged(const A* table, Vector<A>* parts) {
  if constexpr (Members<T, kInterleaved>::kParts == 2) {
    Packed<A>::load_pairs(table, parts[0], parts[1]);
  } else {
    *parts = read<Vector<A>>(table);
  }
}
template <class T, bool kInterleaved, class A = typename Compute<T>::type>
INLINE void arrange(A* table, int64_t count) {
  if constexpr (Members<T, kInterleaved>::kParts == 2) {
    for (int64_t j = 0; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
      Vector<A> parts[2];
      load_arranged<T, kInterleaved>(table + j, parts);
      write(table + j, parts[0]);
      write(table + j + kLanes<A>, parts[1]);
    }
  }
}

}  // namespace ROPE_FUSED_ISA
