// mean_square, by itself and as the statistics of forward.
#include <gtest/gtest.h>

#include <cmath>

#include "case_grid.hpp"
#include "device_memory.hpp"
#include "formula.hpp"

namespace rmsnorm_test {
namespace {

// Rounded once into f32, and from doubles; compensated sums of floats are worth 42 bits and more.
double budget(DType t, DType out) { return out == DType::f64 && t != DType::f64 ? 0x1p10 : 0.501; }

void expect_exact(MeanSquareProblem& problem, DType t, DType out) {
  const std::vector<std::uint64_t> got = run_on_device(problem);
  const std::vector<long double> exact = problem.exact();
  for (std::size_t row = 0; row < got.size(); ++row) {
    EXPECT_LE(ulp_error(out, exact[row], decode(out, got[row])), budget(t, out))
        << describe(problem.description());
  }
}

TEST(CudaMeanSquare, IsExact) {
  for (const DType t : all_dtypes) {
    for (const DType out : {DType::f32, DType::f64}) {
      for (const Layout layout : output_layouts) {
        for (const double partial : {1.0, 0.3}) {
          for (const std::int64_t n : {1, 8, 33, 257, 900, 2300}) {
            if (grid_is_small() && n > 300) continue;
            MeanSquareProblem problem(t, out, {2, 3, n}, -1, layout, partial);
            expect_exact(problem, t, out);
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(CudaMeanSquare, OfSeveralAxes) {
  for (const Layout layout : output_layouts) {
    MeanSquareProblem many(DType::f32, DType::f64, {3, 4, 50}, 1, layout, 1);
    MeanSquareProblem one(DType::f32, DType::f64, {3, 200}, 1, Layout::contiguous, 1);
    MeanSquareProblem all(DType::f32, DType::f64, {600}, 0, Layout::contiguous, 1);
    EXPECT_EQ(run_on_device(many), run_on_device(one));
    EXPECT_EQ(run_on_device(all).size(), 1u);
  }
}

TEST(CudaMeanSquare, OfLongRows) {
  for (const std::int64_t vectors : {2049, 3700, 17000}) {
    if (grid_is_small() && vectors > 3000) continue;
    for (const DType t : all_dtypes) {
      const std::int64_t n = vectors * 16 / rmsnorm::size_in_bytes(t) + 1;
      for (const double partial : {1.0, 0.51}) {
        MeanSquareProblem problem(t, DType::f64, {2, n}, -1, Layout::contiguous, partial);
        expect_exact(problem, t, DType::f64);
      }
    }
  }
}

// One row of five, and of each warp's several, has squares beyond the compute type.
TEST(CudaMeanSquare, OfHugeAndTinyRows) {
  for (const DType t : {DType::bf16, DType::f32, DType::f64}) {
    const Format f = format_of(t);
    for (const std::int64_t n : {5, 40, 300, 3000}) {
      for (int k = f.min_exponent - f.precision + 1; k < f.max_exponent;
           k += t == DType::f64 ? 97 : 11) {
        if (t == DType::f64 && (k < -500 || k > 500)) continue;  // the square must be a double
        MeanSquareProblem problem(t, DType::f64, {7, n}, 1, Layout::contiguous, 1);
        for (std::int64_t i = 0; i < problem.x.count(); ++i) {
          if (i / n % 5 == 1) problem.x.set(i, std::ldexp(1 + static_cast<double>(i % 7) / 8, k));
        }
        problem.keep();
        expect_exact(problem, t, DType::f64);
        if (HasFailure()) return;
      }
    }
  }
}

TEST(CudaMeanSquare, OfSpecialRows) {
  for (const DType t : all_dtypes) {
    for (const std::int64_t n : {10, 1000}) {
      MeanSquareProblem problem(t, DType::f32, {5, n}, 1, Layout::contiguous, 1);
      problem.x.set(1 * n + n / 2, NAN);
      problem.x.set(2 * n + n - 1, -HUGE_VAL);
      for (std::int64_t i = 3 * n; i < 4 * n; ++i) problem.x.set(i, 0);
      problem.keep();
      const std::vector<std::uint64_t> got = run_on_device(problem);
      EXPECT_TRUE(std::isfinite(decode(DType::f32, got[0])));
      EXPECT_TRUE(is_nan(DType::f32, got[1]));
      EXPECT_EQ(decode(DType::f32, got[2]), HUGE_VAL);
      EXPECT_EQ(decode(DType::f32, got[3]), 0);
      EXPECT_TRUE(std::isfinite(decode(DType::f32, got[4])));
    }
  }
}

// y is f32 for 16-bit x, since from 16 to 16 bits forward sums in plain floats and mean_square does
// not.
TEST(CudaMeanSquare, GivesForwardItsOwnStatistics) {
  for (const DType t : all_dtypes) {
    for (const std::int64_t n : {16, 700, 20000}) {
      if (grid_is_small() && n > 1000) continue;
      Case whole;
      whole.sizes = {3, n};
      whole.x = whole.weight = tensor(t);
      whole.y = tensor(rmsnorm::promote(t, DType::f32));
      whole.rstd = tensor(whole.rstd_type());
      Case given = whole;
      given.mean_square = tensor(DType::f64);
      ForwardProblem computed(whole), with_given(given);
      rmsnorm::MeanSquareParams p;
      p.x = with_given.x.view();
      p.mean_square = with_given.mean_square.view();
      const DeviceCopies copies(with_given.memories());
      ASSERT_TRUE(rmsnorm::cuda::mean_square(copies.translated(p), nullptr).ok());
      copies.copy_back();
      with_given.keep();
      expect_same(given, run_on_device(computed), run_on_device(with_given), "its own statistics");
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
