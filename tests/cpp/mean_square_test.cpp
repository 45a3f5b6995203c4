// mean_square, by itself and as the statistics of forward.
#include <gtest/gtest.h>

#include <cmath>

#include "formula.hpp"
#include "instruction_sets.hpp"
#include "mean_square_problem.hpp"

namespace rmsnorm_test {
namespace {

std::vector<std::uint64_t> on_cpu(MeanSquareProblem& problem, Isa isa,
                                  const std::vector<Range>& rows) {
  return problem.run(
      [&](const rmsnorm::MeanSquareParams& p) {
        for (const Range& r : rows) {
          const rmsnorm::Status status = rmsnorm::cpu::mean_square(p, r.first, r.second, isa);
          if (!status.ok()) return status;
        }
        return rmsnorm::Status();
      },
      rows);
}

TEST(MeanSquare, IsExactAndTheSameEverywhere) {
  for (const DType t : all_dtypes) {
    for (const DType out : {DType::f32, DType::f64}) {
      for (const Layout layout : output_layouts) {
        for (const double partial : {1.0, 0.3}) {
          for (const std::int64_t n : {1, 33, 257, 900}) {
            MeanSquareProblem problem(t, out, {2, 3, n}, -1, layout, partial);
            const std::vector<std::uint64_t> expected = on_cpu(problem, Isa::scalar, {{0, 6}});
            const std::vector<long double> exact = problem.exact();
            // Double lanes add up 4 blocks' worth of roundings of 2^-53. Of doubles the squares'
            // rounding is left, which may be an ulp, and that of the mean.
            const double budget = out == DType::f32 ? 0.501 : t == DType::f64 ? 1.501 : 16;
            for (std::size_t row = 0; row < 6; ++row) {
              EXPECT_LE(ulp_error(out, exact[row], decode(out, expected[row])), budget)
                  << describe(problem.description());
            }
            for (const Isa isa : available_isas()) {
              EXPECT_EQ(on_cpu(problem, isa, {{0, 6}}), expected) << name(isa);
              EXPECT_EQ(on_cpu(problem, isa, {{4, 6}, {0, 0}, {0, 4}}), expected) << name(isa);
            }
            on_cpu(problem, Isa::scalar, {{2, 3}});
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(MeanSquare, OfSeveralAxes) {
  for (const Layout layout : output_layouts) {
    MeanSquareProblem many(DType::f32, DType::f64, {3, 4, 50}, 1, layout, 1);
    MeanSquareProblem one(DType::f32, DType::f64, {3, 200}, 1, Layout::contiguous, 1);
    MeanSquareProblem all(DType::f32, DType::f64, {600}, 0, Layout::contiguous, 1);
    EXPECT_EQ(on_cpu(many, Isa::scalar, {{0, 3}}), on_cpu(one, Isa::scalar, {{0, 3}}));
    EXPECT_EQ(on_cpu(all, Isa::scalar, {{0, 1}}).size(), 1u);
  }
}

// forward over a row whose shards' mean squares were averaged elsewhere. y is f32 for 16-bit x,
// since from 16 to 16 bits forward sums in float lanes and mean_square does not.
TEST(MeanSquare, GivesForwardItsOwnStatistics) {
  for (const DType t : all_dtypes) {
    if (t == DType::f64) continue;  // whose own mean is a pair of numbers, and rounded here
    Case whole;
    whole.sizes = {3, 700};
    whole.x = whole.weight = tensor(t);
    whole.y = tensor(rmsnorm::promote(t, DType::f32));
    whole.rstd = tensor(whole.rstd_type());
    Case given = whole;
    given.mean_square = tensor(DType::f64);
    ForwardProblem computed(whole), with_given(given);
    rmsnorm::MeanSquareParams p;
    p.x = with_given.x.view();
    p.mean_square = with_given.mean_square.view();
    for (const Isa isa : available_isas()) {
      ASSERT_TRUE(rmsnorm::cpu::mean_square(p, 0, 3, isa).ok());
      with_given.keep();
      expect_same(given, computed.run(isa), with_given.run(isa), name(isa));
    }
  }
}

// Squares beyond float, whose mean is still a double.
TEST(MeanSquare, OfHugeAndTinyRows) {
  for (const int k : {-140, -100, -70, 70, 100, 126}) {
    MeanSquareProblem problem(DType::f32, DType::f64, {1, 300}, 1, Layout::contiguous, 1);
    for (std::int64_t i = 0; i < 300; ++i) {
      problem.x.set(i, std::ldexp(1 + static_cast<double>(i % 7) / 8, k));
    }
    const long double exact = problem.exact()[0];
    problem.keep();
    for (const Isa isa : available_isas()) {
      const double got = decode(DType::f64, on_cpu(problem, isa, {{0, 1}})[0]);
      EXPECT_LE(ulp_error(DType::f64, exact, got), 0x1p31) << k << ' ' << name(isa);
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
