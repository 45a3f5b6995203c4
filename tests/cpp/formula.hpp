// The contract's formula computed a second time, in two ways: every rounding emulated one by one
// from the library's own rstd on, and exactly, with no rounding of the row's statistics at all.
#pragma once

#include <vector>

#include "forward_problem.hpp"

namespace rmsnorm_test {

// x, or the residual sum: what is normalised, after the roundings that the options ask for.
struct Normalised {
  std::vector<double> values;
  std::vector<double> sum_rounded;  // what residual_out holds; empty without a residual
  DType type;                       // T of the contract
};
Normalised normalised(const Case& c, const Inputs& in);

// y and residual_out, bit by bit, from the given rstd of each row.
Results emulate(const Case& c, const Inputs& in, const std::vector<double>& rstd);

// rstd that belongs to a given mean square, before its one rounding.
long double rstd_of_mean_square(const Case& c, double mean_square);

// Statistics of every row in extended precision: the mean square of the first ceil(partial * n)
// elements, or the given one.
std::vector<long double> exact_mean_squares(const Case& c, const Inputs& in, const Normalised& v);

// Largest distances from exact arithmetic, in ulps of the output's dtype.
struct Errors {
  double y = 0;
  double rstd = 0;
};
Errors errors_of(const Case& c, const Inputs& in, const Results& results);

// What the contract allows y to be off, with Rounding::once and no bias that cancels.
double y_budget(const Case& c);

// Whether what is normalised and y are f16 or bf16: squares are then summed in float.
bool is_all_16_bit(const Case& c);

}  // namespace rmsnorm_test
