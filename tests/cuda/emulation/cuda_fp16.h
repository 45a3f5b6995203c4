// IEEE half precision as cuda_fp16.h has it: conversions only, on bits.
#pragma once

#include <cstdint>

#include "device_arithmetic.h"
#include "vector_types.h"

struct alignas(2) __half {
  std::uint16_t bits;
};

struct alignas(4) __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return __half{bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }

inline __half __float2half_rn(float value) {
  const std::uint32_t word = cuda_emulation::same_bits<std::uint32_t>(value);
  const std::uint32_t sign = (word >> 16) & 0x8000u;
  const std::uint32_t magnitude = word & 0x7fffffffu;
  std::uint32_t rounded = 0;
  if (magnitude > 0x7f800000u) return __half{0x7fff};
  if (magnitude >= 0x47800000u) {  // 65536, or infinity
    rounded = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14: normal halves
    // The exponent's bias falls by 112; a carry past the largest half arrives at infinity.
    rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else if (magnitude >= 0x33000000u) {  // 2^-25: may round to a denormal
    const std::uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    const std::uint32_t dropped = 126u - (magnitude >> 23);  // bits below 2^-24, 14 to 24
    const std::uint32_t odd = (significand >> dropped) & 1u;
    rounded = (significand + (1u << (dropped - 1)) - 1u + odd) >> dropped;
  }
  return __half{static_cast<std::uint16_t>(sign | rounded)};
}

inline float __half2float(__half h) {
  const std::uint32_t sign = (h.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (h.bits >> 10) & 0x1fu;
  const std::uint32_t fraction = h.bits & 0x3ffu;
  if (exponent == 0x1f) {
    return __uint_as_float(fraction != 0 ? 0x7fffffffu : sign | 0x7f800000u);
  }
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

inline __half2 __floats2half2_rn(float a, float b) {
  return __half2{__float2half_rn(a), __float2half_rn(b)};
}

inline float2 __half22float2(__half2 h) { return float2{__half2float(h.x), __half2float(h.y)}; }
