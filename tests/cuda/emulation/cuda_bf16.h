// bfloat16 as cuda_bf16.h has it: conversions only, on bits.
#pragma once

#include <cstdint>

#include "device_arithmetic.h"
#include "vector_types.h"

struct alignas(2) __nv_bfloat16 {
  std::uint16_t bits;
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16{bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const std::uint32_t word = cuda_emulation::same_bits<std::uint32_t>(value);
  if ((word & 0x7fffffffu) > 0x7f800000u) return __nv_bfloat16{0x7fff};
  // Half a unit less one, and one more where the kept part is odd: ties go to even.
  const std::uint32_t rounded = word + 0x7fffu + ((word >> 16) & 1u);
  return __nv_bfloat16{static_cast<std::uint16_t>(rounded >> 16)};
}

inline float __bfloat162float(__nv_bfloat16 h) {
  return __uint_as_float(static_cast<std::uint32_t>(h.bits) << 16);
}

inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return __nv_bfloat162{__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
