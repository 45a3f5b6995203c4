// From the mean square of a row to 1 / sqrt: the parts that the CPU and the CUDA side share.
#pragma once

#include <cmath>
#include <cstdint>

#include "contract.hpp"
#include "host_device.hpp"

namespace rmsnorm {
namespace detail {

// Where mean_square + eps may lie for the row to be computed as it is. Below, squares that
// underflow could be missed: each costs at most half of the smallest denormal, 2^-150 or 2^-1075,
// so that at these bounds the relative error of the mean is below 2^-50 or 2^-75. Above, sums
// overflow; those of doubles are left to scaling from 2^1000 on, since what the second fma in
// root_residual gives of a square is denormal below 2^-969, and misses more than 2^-75 of it below
// 2^-1000.
template <class C>
struct SafeRange;
template <>
struct SafeRange<float> {
  static constexpr double least = 0x1p-100, most = 0x1p126;
  static constexpr double least_normal_rstd = 0x1p-126;
};
template <>
struct SafeRange<double> {
  static constexpr double least = 0x1p-1000, most = 0x1p1000;
  static constexpr double least_normal_rstd = 0x1p-1022;
};

// A sum, a mean or a mean with eps as an unevaluated sum of two numbers: `low` is what `high`
// lacks.
template <class C>
struct Statistic {
  C high;
  C low;
};

// a + b without an error (Knuth, TAOCP 2, 4.2.2 theorem B), as long as nothing overflows.
RMSNORM_HOST_DEVICE inline Statistic<double> exact_sum(double a, double b) {
  const double sum = a + b;
  const double grown = sum - a;
  return {sum, (a - (sum - grown)) + (b - grown)};
}

// The sum rounded once. Errors of an infinite sum are NaN, and must not hide it.
RMSNORM_HOST_DEVICE inline double rounded(Statistic<double> v) {
  return v.low - v.low == 0.0 ? v.high + v.low : v.high;
}

// The mean of `count` numbers of that sum. The remainder of the quotient is exact, so that the mean
// errs by 2^-53 of its low part alone.
RMSNORM_HOST_DEVICE inline Statistic<double> mean_of(Statistic<double> sum, double count) {
  const double quotient = sum.high / count;
  const double remainder = std::fma(-quotient, count, sum.high);
  return {quotient, (remainder + sum.low) / count};
}

// v + eps, where high is that rounded once, and low at most half an ulp of it.
RMSNORM_HOST_DEVICE inline Statistic<double> plus(Statistic<double> v, double eps) {
  const Statistic<double> sum = exact_sum(v.high, eps);
  const double low = sum.low + v.low;
  const double high = rounded({sum.high, low});
  return {high, low - (high - sum.high)};
}

// 1 - v r^2, for an r near 1 / sqrt(v). Half of it is what r lacks, relative to r.
RMSNORM_HOST_DEVICE inline double root_residual(Statistic<double> v, double r) {
  const double square = r * r;
  const double square_error = std::fma(r, r, -square);
  const double residual = std::fma(-v.high, square_error, std::fma(-v.high, square, 1.0));
  return std::fma(-v.low, square, residual);
}

RMSNORM_HOST_DEVICE inline bool is_positive_and_finite(double v) { return v > 0.0 && v - v == 0.0; }

// 1 / sqrt(v), rounded to C. The root and the quotient in double leave 29 bits for float, and low
// is not asked for; for double their errors are removed by a Newton step on the residual, of which
// the last operation alone rounds visibly.
template <class C>
RMSNORM_HOST_DEVICE inline double reciprocal_root(Statistic<double> v) {
  const double r = 1.0 / std::sqrt(v.high);
  if (sizeof(C) == sizeof(float)) return static_cast<double>(static_cast<float>(r));
  if (!(v.high >= SafeRange<double>::least && v.high <= SafeRange<double>::most)) return r;
  return std::fma(0.5 * r, root_residual(v, r), r);
}

// A row is normalised as (x * 2^exponent) * rstd, where rstd lies in [1, 2) for exponents above 0
// and in [1/2, 1) for those below: x * 2^exponent then lies between x and the product, so that it
// neither overflows nor loses bits where the product does not. The rest is what rstd lacks of the
// root where there is an exponent.
struct RowScale {
  double rstd;
  int exponent;
  double rest;
};

// Of the mean square v of a row that is scaled so that v is in the safe range; it may be NaN where
// no element counts.
template <class C>
RMSNORM_HOST_DEVICE inline RowScale scale_of_root(Statistic<double> v, int exponent) {
  const double r = reciprocal_root<C>(v);
  const double rest = 0.5 * r * root_residual(v, r);
  if (exponent == 0 || !is_positive_and_finite(v.high)) return {r, exponent, rest};
  const int moved = std::ilogb(r) + (exponent < 0 ? 1 : 0);
  return {std::ldexp(r, -moved), exponent + moved, std::ldexp(rest, -moved)};
}

// rstd * 2^exponent as the number of C that is returned. Where C has fewer bits for it than for
// rstd, the root itself is rounded: rounding twice can err by up to 0.75 units. What is found first
// misses what both roundings cut off, and the fma rounds their sum once.
template <class C>
RMSNORM_HOST_DEVICE inline C returned_rstd(const RowScale& scale) {
  if (scale.exponent == 0) return static_cast<C>(scale.rstd);
  const C near = static_cast<C>(std::ldexp(scale.rstd, scale.exponent));
  const double found = static_cast<double>(near);
  if (!(found >= 0.0 && found <= SafeRange<C>::least_normal_rstd)) return near;
  const double missing = scale.rstd - std::ldexp(found, -scale.exponent) + scale.rest;
  return static_cast<C>(std::fma(missing, std::ldexp(1.0, scale.exponent), found));
}

// The exponent that brings the larger of a row's largest magnitude and sqrt(eps) to [1, 2).
RMSNORM_HOST_DEVICE inline int exponent_to_one(double largest, double eps) {
  const double root_eps = std::sqrt(eps);
  return -std::ilogb(largest > root_eps ? largest : root_eps);
}

// With statistics that the caller gives, only 1 / sqrt can leave the range of C.
template <class C>
RMSNORM_HOST_DEVICE inline RowScale rescue_given(Statistic<double> v) {
  if (!is_positive_and_finite(v.high)) return {reciprocal_root<C>(v), 0, 0.0};
  const int exponent = -std::ilogb(v.high) / 2;
  return scale_of_root<C>({std::ldexp(v.high, 2 * exponent), std::ldexp(v.low, 2 * exponent)},
                          exponent);
}

inline bool is_16_bit(DType t) { return size_in_bytes(t) == 2; }

// How many elements of a row of n the statistics are taken from.
inline std::int64_t statistic_count(std::int64_t n, double partial) {
  if (partial == 1.0) return n;
  const std::int64_t k = static_cast<std::int64_t>(std::ceil(partial * static_cast<double>(n)));
  return k < n ? k : n;
}

}  // namespace detail
}  // namespace rmsnorm
