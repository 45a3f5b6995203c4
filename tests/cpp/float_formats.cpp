#include "float_formats.hpp"

#include <cmath>
#include <cstring>
#include <limits>

namespace rmsnorm_test {
namespace {

constexpr int fraction_bits(DType t) { return format_of(t).precision - 1; }

constexpr int exponent_bits(DType t) { return t == DType::f16 ? 5 : t == DType::f64 ? 11 : 8; }

}  // namespace

double decode(DType t, std::uint64_t bits) {
  if (t == DType::f64) {
    double v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  const int fraction_width = fraction_bits(t);
  const int exponent_width = exponent_bits(t);
  const auto fraction = static_cast<double>(bits & ((std::uint64_t{1} << fraction_width) - 1));
  const int field =
      static_cast<int>((bits >> fraction_width) & ((std::uint64_t{1} << exponent_width) - 1));
  const bool negative = ((bits >> (fraction_width + exponent_width)) & 1) != 0;
  const Format f = format_of(t);
  double magnitude;
  if (field == (1 << exponent_width) - 1) {
    magnitude = fraction == 0 ? std::numeric_limits<double>::infinity()
                              : std::numeric_limits<double>::quiet_NaN();
  } else if (field == 0) {
    magnitude = std::ldexp(fraction, f.min_exponent - fraction_width);
  } else {
    magnitude = std::ldexp(fraction + std::ldexp(1.0, fraction_width),
                           f.min_exponent + field - 1 - fraction_width);
  }
  return negative ? -magnitude : magnitude;
}

std::uint64_t encode(DType t, double value) {
  const int fraction_width = fraction_bits(t);
  const int exponent_width = exponent_bits(t);
  const std::uint64_t infinity = ((std::uint64_t{1} << exponent_width) - 1) << fraction_width;
  const std::uint64_t quiet = std::uint64_t{1} << (fraction_width - 1);
  if (std::isnan(value)) return infinity | quiet;
  const std::uint64_t sign =
      std::signbit(value) ? std::uint64_t{1} << (fraction_width + exponent_width) : 0;
  const double magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return sign | infinity;
  if (magnitude == 0) return sign;
  int e;
  std::frexp(magnitude, &e);
  e -= 1;
  const Format f = format_of(t);
  if (e < f.min_exponent) {
    return sign |
           static_cast<std::uint64_t>(std::ldexp(magnitude, fraction_width - f.min_exponent));
  }
  const auto m = static_cast<std::uint64_t>(std::ldexp(magnitude, fraction_width - e));
  const auto field = static_cast<std::uint64_t>(e - f.min_exponent + 1);
  return sign | (field << fraction_width) | (m - (std::uint64_t{1} << fraction_width));
}

double round_to(DType t, double value) {
  if (t == DType::f64 || value == 0 || !std::isfinite(value)) return value;
  if (t == DType::f32) return static_cast<double>(static_cast<float>(value));
  const Format f = format_of(t);
  const int e = std::ilogb(value);
  const int q = (e < f.min_exponent ? f.min_exponent : e) - (f.precision - 1);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -q)), q);
  const double largest = std::ldexp(2.0 - std::ldexp(1.0, 1 - f.precision), f.max_exponent);
  if (std::fabs(rounded) > largest) {
    return std::copysign(std::numeric_limits<double>::infinity(), value);
  }
  return rounded;
}

long double ulp_at(DType t, long double v) {
  const Format f = format_of(t);
  int e = v == 0 ? f.min_exponent : std::ilogb(v);
  if (e < f.min_exponent) e = f.min_exponent;
  return std::ldexp(1.0L, e - (f.precision - 1));
}

double ulp_error(DType t, long double exact, double got) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (std::isnan(exact) || std::isnan(got)) {
    return std::isnan(exact) && std::isnan(got) ? 0 : infinity;
  }
  if (std::isinf(exact)) return static_cast<long double>(got) == exact ? 0 : infinity;
  if (std::isinf(got)) {
    const Format f = format_of(t);
    const long double first_too_large = std::ldexp(1.0L, f.max_exponent + 1);
    const long double distance = got > 0 ? first_too_large - exact : exact + first_too_large;
    if (distance <= 0) return 0;
    return static_cast<double>(distance / std::ldexp(1.0L, f.max_exponent - (f.precision - 1)));
  }
  return static_cast<double>(std::fabs(static_cast<long double>(got) - exact) / ulp_at(t, exact));
}

bool is_nan(DType t, std::uint64_t bits) {
  const int fraction_width = fraction_bits(t);
  const int width = fraction_width + exponent_bits(t);
  const std::uint64_t infinity = ((std::uint64_t{1} << exponent_bits(t)) - 1) << fraction_width;
  return (bits & ((std::uint64_t{1} << width) - 1)) > infinity;
}

bool is_signalling_nan(DType t, std::uint64_t bits) {
  return is_nan(t, bits) && ((bits >> (fraction_bits(t) - 1)) & 1) == 0;
}

std::uint64_t load_bits(DType t, const void* p) {
  switch (rmsnorm::size_in_bytes(t)) {
    case 8: {
      std::uint64_t bits;
      std::memcpy(&bits, p, sizeof bits);
      return bits;
    }
    case 4: {
      std::uint32_t bits;
      std::memcpy(&bits, p, sizeof bits);
      return bits;
    }
    default: {
      std::uint16_t bits;
      std::memcpy(&bits, p, sizeof bits);
      return bits;
    }
  }
}

void store_bits(DType t, void* p, std::uint64_t bits) {
  switch (rmsnorm::size_in_bytes(t)) {
    case 8: {
      std::memcpy(p, &bits, sizeof bits);
      break;
    }
    case 4: {
      const auto narrow = static_cast<std::uint32_t>(bits);
      std::memcpy(p, &narrow, sizeof narrow);
      break;
    }
    default: {
      const auto narrow = static_cast<std::uint16_t>(bits);
      std::memcpy(p, &narrow, sizeof narrow);
      break;
    }
  }
}

}  // namespace rmsnorm_test
