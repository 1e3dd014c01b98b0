// The maths of one pair: position and turns -> phase -> (cos, sin), and the rotation itself.
//
// A frequency is stored as turns = round(inv_freq / 2pi * 2^64), so that position * turns mod 2^64
// is the angle as a fraction of a full turn: wrapping integer arithmetic is the range reduction,
// exact for every int64 position. Every backend evaluates these lines, so they hold no library call
// that could differ.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ROPE_FUSED_INLINE static __host__ __device__ __forceinline__
#else
#define ROPE_FUSED_INLINE static inline __attribute__((always_inline))
#endif

#ifdef ROPE_FUSED_ISA
namespace ROPE_FUSED_ISA {  // one copy per instruction set: nothing may be shared by the linker
#endif

template <class A>
struct CosSin {
  A cos, sin;
};

// position * turns, in units of 2^-64 turns.
ROPE_FUSED_INLINE uint64_t phase64(int64_t position, uint64_t turns) {
  return static_cast<uint64_t>(position) * turns;
}

// The top 32 bits of phase64: all that a float32 angle can use (2^-32 turns = 1.5e-9 rad).
ROPE_FUSED_INLINE uint32_t phase32(int64_t position, uint64_t turns) {
#if defined(__CUDA_ARCH__)
  // 64-bit products are four instructions there; only the bits above 2^32 are wanted.
  const uint32_t p_lo = static_cast<uint32_t>(position), t_lo = static_cast<uint32_t>(turns);
  const uint32_t p_hi = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
  const uint32_t t_hi = static_cast<uint32_t>(turns >> 32);
  return __umulhi(p_lo, t_lo) + p_lo * t_hi + p_hi * t_lo;
#else
  return static_cast<uint32_t>(phase64(position, turns) >> 32);
#endif
}

// The types that cos_sin works on: one number here, a vector of them in cpu/simd.h.
struct Scalar {
  using Float = float;
  using Word = uint32_t;
  ROPE_FUSED_INLINE Float from_signed(Word word) {
    return static_cast<float>(static_cast<int32_t>(word));
  }
};

template <class To, class From>
ROPE_FUSED_INLINE To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To out;
  memcpy(&out, &value, sizeof out);
  return out;
}

// cos and sin of 2pi * phase / 2^32, within 8e-8. The nearest quarter turn is split off in
// integers; the rest is an angle in [-pi/4, pi/4), where minimax polynomials (Remez, errors 2e-9
// and 1e-10) suffice.
template <class N = Scalar>
ROPE_FUSED_INLINE CosSin<typename N::Float> cos_sin(typename N::Word phase) {
  using Float = typename N::Float;
  using Word = typename N::Word;
  const Word quadrant = (phase + (1u << 29)) >> 30;
  const Float angle = N::from_signed(phase << 2) * 3.6572951981678992e-10f;  // pi / 2^33
  const Float square = angle * angle;
  const Float sine =
      angle + angle * square *
                  (-0.166666506693f + square * (0.00833197866388f + square * -0.000194956363174f));
  const Float cosine =
      1.0f - 0.5f * square +
      square * square *
          (0.0416666468665f + square * (-0.00138873675164f + square * 2.44384516551e-5f));
  // Odd quadrants swap the two; the sign bits follow from the quadrant.
  const Word s = same_bits<Word>(sine), c = same_bits<Word>(cosine);
  const Word differ = (s ^ c) & (0u - (quadrant & 1u));
  return {same_bits<Float>((c ^ differ) ^ ((quadrant + 1u) & 2u) << 30),
          same_bits<Float>((s ^ differ) ^ (quadrant & 2u) << 30)};
}

// The same from all 64 bits, in double. __builtin_* keeps std:: out of per-instruction-set objects;
// CUDA's sin would bring a range reduction that spills.
ROPE_FUSED_INLINE CosSin<double> cos_sin_double(uint64_t phase) {
  const uint64_t quadrant = (phase + (1ull << 61)) >> 62;
  const double fraction = static_cast<double>(static_cast<int64_t>(phase << 2));
#if defined(__CUDA_ARCH__)
  double sine, cosine;
  sincospi(fraction * 0x1p-65, &sine, &cosine);
#else
  const double angle = fraction * 8.5153039502163865e-20;  // pi / 2^65
  const double sine = __builtin_sin(angle), cosine = __builtin_cos(angle);
#endif
  const bool odd = quadrant & 1u;
  const double c = odd ? sine : cosine;
  const double s = odd ? cosine : sine;
  return {((quadrant + 1u) & 2u) ? -c : c, (quadrant & 2u) ? -s : s};
}

// cos and sin of position * inv_freq in the arithmetic of A.
template <class A>
ROPE_FUSED_INLINE CosSin<A> cos_sin_at(int64_t position, uint64_t turns) {
  if constexpr (sizeof(A) == sizeof(float)) {
    return cos_sin(phase32(position, turns));
  } else {
    return cos_sin_double(phase64(position, turns));
  }
}

// (a, b) turned by the angle: (a cos - b sin, b cos + a sin).
template <class A>
struct Pair {
  A a, b;
};
template <class A>
ROPE_FUSED_INLINE Pair<A> rotate(A a, A b, A cos, A sin) {
  return {a * cos - b * sin, b * cos + a * sin};
}

#ifdef ROPE_FUSED_ISA
}  // namespace ROPE_FUSED_ISA
#endif
