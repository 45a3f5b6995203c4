// Distances from exact arithmetic, in ulps, against the budgets of the contract.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "case_grid.hpp"
#include "formula.hpp"
#include "implementations.hpp"
#include "rmsnorm/bounds.hpp"

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

// Rows that come near a bound or were beyond an earlier one, found by searches (tests/proofs). Each
// is a problem of one row, all of one dtype.
struct KnownRow {
  const char* what;
  DType dtype;
  double eps;
  std::vector<double> x, weight;
};

const KnownRow known_rows[] = {
    {"y is above a power of two that the exact y is below: 2.99 of 3 ulp",
     DType::f32,
     1e-6,
     {0x1.002488p+0, 0x1.69a5acp+0, 0x1.cd1bdap-12},
     {0x1.ff70fap+0, 1, 1}},
    {"all squares and additions of doubles round in one direction: 5.1 ulp without the errors of "
     "the additions",
     DType::f64,
     1e-6,
     {0x1.000aeeda6a5e5p+0, 0x1.0009bd8e6de95p+0, 0x1.000c7404bc8a4p+0, 0x1.000d718c28946p+0,
      0x1.000b7bcd7f07p+0, 0x1.000bdcee68f9fp+0, 0x1.6a1e4131193e4p+0, 0x1.6a15b8d38a0f9p+0,
      0x1.000f296e577a7p+0, 0x1.000ce274ed4d4p+0, 0x1.0009892c2f67ep+0, 0x1.000db1d350bffp+0,
      0x1.000baacf018e1p+0, 0x1.000b648af5a45p+0, 0x1.0894dc1e34776p-32},
     {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0x1.ffbbb5cfd4b65p+0}},
    {"rstd of three floats is near a tie: 0.5 + 2^-27.9 ulp of 0.5 + 2^-25.8",
     DType::f32,
     0x1.8936d033931c5p-7,
     {0x1.22c52ap+0, 0x1.bc6c9cp-1, 0x1.f940e6p-1},
     {1, 1, 1}},
    {"rstd of 2^20 equal floats, whose sum errs alike in every block: 0.5 + 2^-21 of 0.5 + 2^-18 "
     "ulp",
     DType::f32, 0x1.433531690b8f3p-14, std::vector<double>(std::size_t{1} << 20, 0x1.fa083p+0),
     std::vector<double>(std::size_t{1} << 20, 1)},
};

TEST(Accuracy, OfKnownRows) {
  for (const KnownRow& row : known_rows) {
    if (grid_is_small() && row.x.size() > 10000) continue;
    SCOPED_TRACE(row.what);
    Case c;
    c.sizes = {1, static_cast<std::int64_t>(row.x.size())};
    c.x = c.weight = c.y = tensor(row.dtype);
    c.rstd = tensor(c.rstd_type());
    c.eps = row.eps;
    ForwardProblem problem(c);
    for (std::size_t i = 0; i < row.x.size(); ++i) {
      problem.x.set(static_cast<std::int64_t>(i), row.x[i]);
      problem.weight.set(static_cast<std::int64_t>(i), row.weight[i]);
    }
    problem.keep();
    for (const Implementation& f : implementations()) expect_within_budget(c, problem, f);
  }
}

// A sum with residual that is not rounded to residual_out is still rounded to float: elements and
// rstd err by that as well, all in the same direction if need be.
TEST(Accuracy, OfAnUnroundedSum) {
  constexpr std::int64_t n = 16;
  Case c;
  c.sizes = {1, n};
  c.residual = c.weight = tensor(DType::f32);
  c.round_residual = false;
  ForwardProblem problem(c);
  for (std::int64_t i = 0; i < n; ++i) {
    const bool small = i == n - 1;
    problem.x.set(i, small ? 0x1.00179ap-20 : 0x1.000cb2p+0);
    problem.residual.set(i, small ? 0x1.0001p-44 : 0x1.fffep-25);  // above and below half an ulp
    problem.weight.set(i, 0x1.efa8dap+0);
  }
  problem.keep();
  const Inputs in = problem.inputs();
  long double sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const long double s = static_cast<long double>(in.x[i]) + in.residual[i];
    sum += s * s;
  }
  const long double rstd = 1 / std::sqrt(sum / n + c.eps);
  for (const Implementation& f : implementations()) {
    const Results got = f.run(problem);
    double worst = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const long double s = static_cast<long double>(in.x[i]) + in.residual[i];
      const double error =
          ulp_error(DType::f32, s * rstd * in.weight[i], decode(DType::f32, got.y[i]));
      worst = std::max(worst, error);
    }
    EXPECT_LE(worst, rmsnorm::error_bound(DType::f32, DType::f32, false, true)) << f.name;
    EXPECT_GT(worst, 4.9) << f.name << ": the bound is no larger than it has to be";
  }
}

}  // namespace
}  // namespace rmsnorm_test
