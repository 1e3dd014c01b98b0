// Storage types of the CPU kernels: load to and store from the compute type, rounding to nearest
// even.
//
// The 16-bit conversions are integer arithmetic without branches, which compilers vectorise for
// every instruction set; hardware conversions differ (AVX512_BF16 flushes subnormals) and are not
// needed at memory speed.
#pragma once

#include <cstdint>

namespace ROPE_FUSED_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline __attribute__((always_inline)) float from_bits(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
static inline __attribute__((always_inline)) uint32_t to_bits(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

static inline __attribute__((always_inline)) float load(float x) { return x; }
static inline __attribute__((always_inline)) double load(double x) { return x; }
static inline __attribute__((always_inline)) float load(BFloat16 x) {
  return from_bits(uint32_t{x.bits} << 16);
}
static inline __attribute__((always_inline)) float load(Float16 x) {
  // Shift exponent and mantissa into place and correct the exponent bias by a multiplication, which
  // also normalises subnormals; the top exponent means infinity or NaN.
  const uint32_t magnitude = (x.bits & 0x7fffu);
  const uint32_t scaled = to_bits(from_bits(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return from_bits(scaled | special | (uint32_t{x.bits} & 0x8000u) << 16);
}

static inline __attribute__((always_inline)) void store(float& to, float x) { to = x; }
static inline __attribute__((always_inline)) void store(double& to, double x) { to = x; }
static inline __attribute__((always_inline)) void store(BFloat16& to, float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}
static inline __attribute__((always_inline)) void store(Float16& to, float x) {
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
static inline __attribute__((always_inline)) A rounded(A x) {
  T stored;
  store(stored, x);
  return load(stored);
}

}  // namespace ROPE_FUSED_ISA
