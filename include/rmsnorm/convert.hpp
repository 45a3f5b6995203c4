// Conversions between the four dtypes in portable C++: to nearest even, denormals kept, NaNs kept
// and made quiet. They define the results; the vector instructions of an ISA must agree with them.
#pragma once

#include <cstdint>
#include <cstring>

#include "contract.hpp"
#include "host_device.hpp"

namespace rmsnorm {
namespace detail {

template <class To, class From>
RMSNORM_HOST_DEVICE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// The IEEE layout of a 16-bit float with `mantissa` stored bits: 10 for f16, 7 for bf16.
template <int mantissa>
struct Float16Layout {
  static constexpr int bias = (1 << (14 - mantissa)) - 1;
  static constexpr int min_exponent = 1 - bias;
  static constexpr std::uint32_t infinity = ((1u << (15 - mantissa)) - 1u) << mantissa;
  static constexpr std::uint32_t quiet_bit = 1u << (mantissa - 1);
};

template <int mantissa>
RMSNORM_HOST_DEVICE inline std::uint16_t narrow_to_16(double value) {
  using Layout = Float16Layout<mantissa>;
  const std::uint64_t bits = bit_cast<std::uint64_t>(value);
  const std::uint32_t sign = static_cast<std::uint32_t>(bits >> 48) & 0x8000u;
  const int biased = static_cast<int>((bits >> 52) & 0x7ff);
  const std::uint64_t fraction = bits & 0xfffffffffffffu;
  if (biased == 0x7ff) {
    const std::uint32_t payload = static_cast<std::uint32_t>(fraction >> (52 - mantissa));
    const std::uint32_t nan = fraction != 0 ? payload | Layout::quiet_bit : 0u;
    return static_cast<std::uint16_t>(sign | Layout::infinity | nan);
  }
  const int exponent = biased - 1023;
  if (exponent > Layout::bias) return static_cast<std::uint16_t>(sign | Layout::infinity);
  // Below half of the smallest denormal everything rounds to zero; double denormals are far below.
  if (exponent < Layout::min_exponent - mantissa - 1) return static_cast<std::uint16_t>(sign);
  const int missing = exponent < Layout::min_exponent ? Layout::min_exponent - exponent : 0;
  const int shift = 52 - mantissa + missing;
  const std::uint64_t significand = fraction | (std::uint64_t{1} << 52);
  const std::uint64_t odd = (significand >> shift) & 1u;
  const std::uint64_t rounded =
      (significand + (std::uint64_t{1} << (shift - 1)) - 1u + odd) >> shift;
  // A carry out of the significand raises the exponent field by one, up to infinity, by itself.
  const int field = missing > 0 ? 0 : exponent - Layout::min_exponent;
  return static_cast<std::uint16_t>(sign | ((static_cast<std::uint32_t>(field) << mantissa) +
                                            static_cast<std::uint32_t>(rounded)));
}

RMSNORM_HOST_DEVICE inline float widen(float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    const std::uint32_t nan = magnitude > 0x7c00u ? 0x400000u : 0u;
    return bit_cast<float>(sign | 0x7f800000u | nan | ((magnitude & 0x3ffu) << 13));
  }
  // Read as a float, the shifted bits are the value times 2^-112, denormals included: the product
  // is exact.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(scaled));
}

RMSNORM_HOST_DEVICE inline float widen(bfloat16 value) {
  return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

RMSNORM_HOST_DEVICE inline float widen(float value) { return value; }
RMSNORM_HOST_DEVICE inline double widen(double value) { return value; }

template <class T>
struct narrow;

template <>
struct narrow<float16> {
  RMSNORM_HOST_DEVICE static float16 from(double value) { return float16{narrow_to_16<10>(value)}; }
};
template <>
struct narrow<bfloat16> {
  RMSNORM_HOST_DEVICE static bfloat16 from(double value) {
    return bfloat16{narrow_to_16<7>(value)};
  }
};
template <>
struct narrow<float> {
  RMSNORM_HOST_DEVICE static float from(double value) { return static_cast<float>(value); }
};
template <>
struct narrow<double> {
  RMSNORM_HOST_DEVICE static double from(double value) { return value; }
};

}  // namespace detail
}  // namespace rmsnorm
