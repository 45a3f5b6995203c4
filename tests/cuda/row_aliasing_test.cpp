// Outputs over inputs: what a row still needs must not have been overwritten.
#include <gtest/gtest.h>

#include <cmath>

#include "case_grid.hpp"
#include "device_memory.hpp"

namespace rmsnorm_test {
namespace {

constexpr Alias aliases[] = {Alias::none, Alias::x, Alias::residual};

// Every other row has to be scaled, for which it is visited again.
Results run_with_tiny_rows(const Case& c) {
  ForwardProblem problem(c);
  const int exponent = format_of(c.x.dtype).min_exponent + 3;
  for (std::int64_t i = 0; i < problem.x.count(); ++i) {
    if (i / c.n() % 2 == 0) continue;
    problem.x.set(i, std::ldexp(problem.x.value(i), exponent));
    if (problem.residual.present()) {
      problem.residual.set(i, std::ldexp(problem.residual.value(i), exponent));
    }
  }
  problem.keep();
  return run_on_device(problem);
}

void expect_aliases_change_nothing(Case apart) {
  apart.eps = 0;
  apart.rstd = tensor(apart.rstd_type());
  const Results expected = run_with_tiny_rows(apart);
  for (const Alias y_over : aliases) {
    for (const Alias sum_over : aliases) {
      if (y_over == sum_over) continue;
      Case over = apart;
      over.y_over = y_over;
      over.residual_out_over = sum_over;
      expect_same(over, expected, run_with_tiny_rows(over), "outputs over inputs");
    }
  }
  // Without residual_out, and without a residual.
  Case without = apart;
  without.residual_out = TensorSpec{};
  without.y_over = Alias::residual;
  Results results = expected;
  results.residual_out.clear();
  expect_same(without, results, run_with_tiny_rows(without), "y over residual");
  Case plain = without;
  plain.residual = TensorSpec{};
  plain.y_over = Alias::none;
  results = run_with_tiny_rows(plain);
  plain.y_over = Alias::x;
  expect_same(plain, results, run_with_tiny_rows(plain), "y over x");
}

TEST(RowAliasing, OfShortRows) {
  for (const DType t : all_dtypes) {
    for (const Layout layout : output_layouts) {
      for (const std::int64_t n : {11, 64}) {
        if (grid_is_small() && n == 11) continue;
        Case c;
        c.sizes = {2, 3, 2, n};
        c.axis = 2;
        c.x = c.residual = c.y = c.residual_out = c.weight = tensor(t, layout);
        expect_aliases_change_nothing(c);
        if (HasFailure()) return;
      }
    }
  }
}

// f16 over bf16: the same elements, another format.
TEST(RowAliasing, OfAnotherDtypeOfTheSameSize) {
  Case apart;
  apart.sizes = {3, 336};
  apart.x = apart.weight = tensor(DType::bf16);
  apart.y = tensor(DType::f16);
  Case over = apart;
  over.y_over = Alias::x;
  ForwardProblem one(apart), other(over);
  expect_same(over, run_on_device(one), run_on_device(other), "f16 over bf16");
}

// Rows in registers, in clusters, in shared memory and read again, by both ways to reach elements.
TEST(RowAliasing, OfLongRows) {
  if (grid_is_small()) return;
  for (const std::int64_t vectors : {200, 2048, 2100, 3700, 10300}) {
    for (const std::int64_t beyond : {0, 1}) {
      const DType t = vectors % 200 == 0 ? DType::f64 : beyond == 0 ? DType::f32 : DType::bf16;
      Case c;
      c.x = c.residual = c.y = c.residual_out = tensor(t);
      c.sizes = {2, vectors * vector_width(c) + beyond};
      if (vectors < 5000) c.weight = tensor(t);
      expect_aliases_change_nothing(c);
      if (HasFailure()) return;
    }
  }
}

// On compute capability 9.0 only these do not fit in the shared memory of a cluster.
TEST(RowAliasing, OfTheLongestRows) {
  if (grid_is_small()) return;
  Case apart;
  apart.x = apart.residual = apart.y = apart.residual_out = tensor(DType::f64);
  apart.sizes = {1, 2 * 115000};
  const Results expected = run_with_tiny_rows(apart);
  Case over = apart;
  over.y_over = Alias::x;
  over.residual_out_over = Alias::residual;
  expect_same(over, expected, run_with_tiny_rows(over), "outputs over inputs");
}

}  // namespace
}  // namespace rmsnorm_test
