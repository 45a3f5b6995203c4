// Distances from exact arithmetic, in ulps, against the budgets of the contract.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "case_grid.hpp"
#include "formula.hpp"
#include "implementations.hpp"

namespace rmsnorm_test {
namespace {

Errors expect_within_budget(const Case& c, ForwardProblem& problem,
                            const Implementation& f = implementations().front()) {
  const Inputs in = problem.inputs();  // before an output may overwrite them
  const Errors errors = errors_of(c, in, f.run(problem));
  // The contract's budget of y is for these; what the others round is in formula_test.cpp.
  if (c.rounding == Rounding::once && !c.bias.present) {
    EXPECT_LE(errors.y, y_budget(c)) << describe(c);
  }
  EXPECT_LE(errors.rstd, rstd_budget(c)) << describe(c);
  return errors;
}

TEST(Accuracy, OverTheGrid) {
  Errors worst[rmsnorm::dtype_count];
  for (Case c : all_cases()) {
    if (c.n() == 0) continue;
    if (!c.rstd.present) c.rstd = tensor(c.rstd_type());
    ForwardProblem problem(c, 5);
    const Errors e = expect_within_budget(c, problem);
    if (HasFailure()) break;
    if (c.rounding != Rounding::once || c.bias.present) continue;
    Errors& w = worst[static_cast<int>(c.y.dtype)];
    w.y = std::max(w.y, e.y);
    w.rstd = std::max(w.rstd, e.rstd);
  }
  for (const DType t : all_dtypes) {
    const Errors& w = worst[static_cast<int>(t)];
    std::printf("  %-8s y within %.4f ulp, rstd within %.4f ulp\n", rmsnorm::name(t), w.y, w.rstd);
  }
}

std::vector<std::int64_t> long_lengths() {
  if (grid_is_small()) return {1000, 4097};
  return {1000, 4096, 70001, std::int64_t{1} << 20};
}

TEST(Accuracy, OfLongRows) {
  for (const DType t : all_dtypes) {
    for (const std::int64_t n : long_lengths()) {
      Case c;
      c.sizes = {2, n};
      c.x = c.weight = c.y = tensor(t);
      c.rstd = tensor(c.rstd_type());
      ForwardProblem problem(c, static_cast<std::uint64_t>(n));
      expect_within_budget(c, problem, implementations().back());
    }
  }
}

// Every addition of a constant row rounds the same way, so that errors pile up instead of
// cancelling; the significand decides which way and how far.
TEST(Accuracy, OfConstantRows) {
  const int tries = grid_is_small() ? 6 : 100;
  for (const DType t : {DType::f32, DType::f64}) {
    for (const std::int64_t n : long_lengths()) {
      if (n > 100000) continue;
      Case c;
      c.sizes = {1, n};
      c.x = c.y = tensor(t);
      c.rstd = tensor(c.rstd_type());
      c.eps = 0;
      ForwardProblem problem(c);
      Random random(static_cast<std::uint64_t>(n));
      for (int i = 0; i < (n > 10000 ? tries / 5 : tries); ++i) {
        const double value = 1.5 + random.symmetric() / 2;
        for (std::int64_t k = 0; k < n; ++k) problem.x.set(k, value);
        problem.keep();
        expect_within_budget(c, problem, implementations().back());
        if (HasFailure()) return;
      }
    }
  }
}

// One element outweighs all others, or a few blocks outweigh all others, first or last.
TEST(Accuracy, OfUnbalancedRows) {
  for (const DType t : all_dtypes) {
    for (const double ratio : {0x1p-5, 0x1p-11, 0x1p-20}) {
      for (const std::int64_t heavy : {0, 255, 256, 2999}) {
        Case c;
        c.sizes = {1, 3000};
        c.x = c.y = tensor(t);
        c.rstd = tensor(c.rstd_type());
        ForwardProblem problem(c);
        for (std::int64_t k = 0; k < 3000; ++k) {
          if (k != heavy) problem.x.set(k, problem.x.value(k) * ratio);
        }
        problem.x.set(heavy, 1.7);
        problem.keep();
        for (const Implementation& f : implementations()) expect_within_budget(c, problem, f);
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
