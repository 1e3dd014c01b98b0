// Storage types of the kernels: load to and store from the compute type, rounding to nearest even.
//
// On a CPU the 16-bit conversions are integer arithmetic without branches, which compilers
// vectorise for every instruction set; hardware conversions differ (AVX512_BF16 flushes subnormals)
// and are not needed at memory speed. A GPU has instructions that do what these lines say, but for
// the bits of a NaN.
#pragma once

#include <cstdint>

#include "rotate.h"

#ifdef ROPE_FUSED_ISA
namespace ROPE_FUSED_ISA {
#endif

struct BFloat16 {
  static constexpr bool kBrain = true;
  uint16_t bits;
};
struct Float16 {
  static constexpr bool kBrain = false;
  uint16_t bits;
};

ROPE_FUSED_INLINE float from_bits(uint32_t bits) { return same_bits<float>(bits); }
ROPE_FUSED_INLINE uint32_t to_bits(float x) { return same_bits<uint32_t>(x); }

ROPE_FUSED_INLINE float load(float x) { return x; }
ROPE_FUSED_INLINE double load(double x) { return x; }
ROPE_FUSED_INLINE float load(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }
ROPE_FUSED_INLINE float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  // Shift exponent and mantissa into place and correct the exponent bias by a multiplication, which
  // also normalises subnormals; the top exponent means infinity or NaN.
  const uint32_t magnitude = (x.bits & 0x7fffu);
  const uint32_t scaled = to_bits(from_bits(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return from_bits(scaled | special | (uint32_t{x.bits} & 0x8000u) << 16);
#endif
}

ROPE_FUSED_INLINE void store(float& to, float x) { to = x; }
ROPE_FUSED_INLINE void store(double& to, double x) { to = x; }
ROPE_FUSED_INLINE void store(BFloat16& to, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
#endif
}
ROPE_FUSED_INLINE void store(Float16& to, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = to_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal numbers: rebias the exponent and round the 13 dropped bits to even (a carry may reach
  // infinity).
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormals: adding 0.5 lines the mantissa up with 2^-24 steps and lets the float adder round.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite =
      magnitude < 0x38800000u ? subnormal : (magnitude >= 0x477ff000u ? 0x7c00u : normal);
  const uint32_t result = magnitude > 0x7f800000u ? 0x7e00u : finite;
  to.bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
#endif
}

// The type arithmetic is done in.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

// x as it would be after a trip through T: the rounding of one operation done in T.
template <class T, class A>
ROPE_FUSED_INLINE A rounded(A x) {
  T stored;
  store(stored, x);
  return load(stored);
}

#ifdef ROPE_FUSED_ISA
}  // namespace ROPE_FUSED_ISA
#endif
