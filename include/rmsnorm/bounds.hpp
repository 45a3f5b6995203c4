// How far results may be from exact arithmetic: the one table of what is promised, which the tests,
// `python -m rmsnorm` and the proofs read. docs/proofs.md tells what of it is proved by machine and
// what by hand, docs/numerics.md under which conditions it holds.
//
// Errors are in ulps, units in the last place that the result's dtype has at the exact value: of p
// bits it has an ulp of 2^(k - p + 1) in [2^k, 2^(k+1)), and that of the smallest normal numbers
// below them.
#pragma once

#include <cstdint>

#include "contract.hpp"

namespace rmsnorm {

// Of y with Rounding::once.
struct ErrorBound {
  DType dtype;                     // of y
  double from_float, from_double;  // by compute type
  // To be added where y has the compute type and weight_offset + weight is rounded to it,
  double rounded_weight;
  // and where x + residual is rounded to it and not to residual_out, since round_residual is false:
  // the element and, where all elements are rounded alike, rstd err by a unit each.
  double unrounded_sum;
};

constexpr ErrorBound error_bounds[dtype_count] = {
    {DType::f16, 0.51, 0.51, 0, 0},
    {DType::bf16, 0.51, 0.51, 0, 0},
    {DType::f32, 3, 0.51, 1, 2},
    {DType::f64, 4, 4, 1, 2},
};

constexpr double error_bound(DType y, DType compute_type, bool rounded_weight = false,
                             bool unrounded_sum = false) {
  const ErrorBound& b = error_bounds[static_cast<std::int32_t>(y)];
  return (compute_type == DType::f64 ? b.from_double : b.from_float) +
         (y == compute_type && rounded_weight ? b.rounded_weight : 0) +
         (y == compute_type && unrounded_sum ? b.unrounded_sum : 0);
}

// Of rstd on the CPU, in ulps of the compute type, for `count` squares of what is normalised.
// `sums_floats`: that and y are f16 or bf16, whose squares are summed in float.
//   - f64: half an ulp to round it. The rounding of the squares, halved by the root, is as much.
//   - f32: computed in double, where each block of 256 elements adds a rounding.
//   - 16 bits: up to nine roundings in float, halved by the root, half an ulp where the sum with
//     residual is not rounded to 16 bits, and its own rounding: an ulp of the exact value where
//     that is below a power of two and rstd above.
constexpr double rstd_bound(DType compute_type, bool sums_floats, std::int64_t count) {
  if (compute_type == DType::f64) return 1.001;
  if (sums_floats) return 5.76;
  return 0.5 + static_cast<double>((count + 255) / 256 + 17) * 0x1p-30;
}

}  // namespace rmsnorm
