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

// Of rstd, in ulps of the compute type, for rows of up to 2^20 elements: against 1 / sqrt of the
// exact mean square of what is normalised, a sum with residual being what it is in the compute
// type.
//
// On the CPU, for `count` squares. `sums_floats`: what is normalised and y are f16 or bf16.
//   - f64: half an ulp to round it. The rounding of the squares, halved by the root, is as much.
//   - f32: computed in double, where each block of 256 elements adds a rounding.
//   - 16 bits: nine roundings in float, those in double less than another half, halved by the root;
//     and an ulp to round it, where it is above a power of two that the exact value is below.
constexpr double cpu_rstd_bound(DType compute_type, bool sums_floats, std::int64_t count) {
  if (compute_type == DType::f64) return 1.001;
  if (sums_floats) return 5.76;
  return 0.5 + static_cast<double>((count + 255) / 256 + 17) * 0x1p-30;
}

// On CUDA. `roundings`: how many a square goes through between 16-bit tensors whose row is held in
// registers, 31 at most; 0 elsewhere, where sums carry their errors.
constexpr double cuda_rstd_bound(DType compute_type, int roundings) {
  if (compute_type == DType::f64) return 1.001;
  return roundings > 0 ? 1.001 + roundings / 2.0 : 0.5 + 0x1p-12;
}

}  // namespace rmsnorm
