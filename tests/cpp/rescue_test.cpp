// Rows whose squares overflow or underflow the compute type come out right all the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "case_grid.hpp"
#include "formula.hpp"
#include "implementations.hpp"

namespace rmsnorm_test {
namespace {

constexpr std::int64_t n = 301;

struct Powers {
  int least, most;
};

// Powers of two k for which every 2^k x of this test is finite and not yet denormal.
Powers normal_powers(DType t) {
  const Format f = format_of(t);
  return {f.min_exponent + 4, f.max_exponent - 2};
}

// Significands in +-[1, 4) make no element leave the normal numbers under scaling.
void fill(ForwardProblem& problem, int exponent) {
  Random random(23);
  for (GuardedTensor* t : {&problem.x, &problem.residual}) {
    for (std::int64_t i = 0; i < t->count(); ++i) {
      const double v = std::exp2(random.symmetric() + 1) * (random.below(2) == 0 ? 1 : -1);
      const double rounded = round_to(DType::bf16, v);
      t->set(i, std::ldexp(t == &problem.x ? rounded : 0.25 * rounded, exponent));
    }
  }
  problem.keep();
}

Case scale_case(DType t, int variant) {
  Case c;
  c.sizes = {2, n};
  c.x = c.y = tensor(t);
  c.eps = 0;
  if (variant == 1) c.weight = tensor(t);
  if (variant == 2) c.residual = c.residual_out = tensor(t);
  if (variant == 3) {
    c.x.layout = Layout::inner_stride_two;
    c.residual = tensor(t);
    c.partial = 0.4;
  }
  if (variant == 4) {
    c.weight = tensor(t);
    c.rounding = Rounding::before_weight;
    c.y_over = Alias::x;
  }
  if (variant == 5) c.rounding = Rounding::rstd;
  return c;
}

// With eps = 0 the power of two cancels exactly.
TEST(Rescue, PowersOfTwoDoNotChangeTheResult) {
  for (const DType t : all_dtypes) {
    for (int variant = 0; variant < 6; ++variant) {
      if (variant == 5 && t == DType::f16) continue;  // rstd may be denormal in f16
      const Case c = scale_case(t, variant);
      ForwardProblem problem(c);
      fill(problem, 0);
      const std::vector<std::uint64_t> expected = implementations().front().run(problem).y;
      const Powers powers = normal_powers(t);
      const int step = (grid_is_small() ? 24 : 1) * (t == DType::f64 ? 7 : 1);
      for (int k = powers.least; k <= powers.most; k += step) {
        fill(problem, k);
        for (const Implementation& f : implementations()) {
          Results got = f.run(problem);
          if (!result_is_checked(c)) continue;
          ASSERT_EQ(got.y, expected) << "2^" << k << ' ' << f.name << ' ' << describe(c);
        }
      }
    }
  }
}

// Down to denormals, where elements lose bits: within the budget of what they then are.
TEST(Rescue, EveryFiniteRowIsWithinBudget) {
  for (const DType t : all_dtypes) {
    const Format format = format_of(t);
    const int step = (grid_is_small() ? 24 : 1) * (t == DType::f64 ? 11 : 1);
    // Too small to hide an underflow in float, or in double, but not too small to count.
    for (const double eps : {0.0, 1e-33, 1e-305, 1e-6}) {
      for (int k = format.min_exponent - format.precision + 1; k <= format.max_exponent - 1;
           k += step) {
        Case c = scale_case(t, 1);
        c.eps = eps;
        ForwardProblem problem(c);
        for (std::int64_t i = 0; i < problem.x.count(); ++i) {
          problem.x.set(i, std::ldexp(std::fmod(problem.x.value(i), 1.9), k));
        }
        problem.keep();
        if (problem.inputs().x == std::vector<double>(std::size_t(2 * n), 0.0)) continue;
        for (const Implementation& f : implementations()) {
          const Errors errors = errors_of(c, problem.inputs(), f.run(problem));
          ASSERT_LE(errors.y, y_budget(c)) << "2^" << k << ' ' << f.name << ' ' << describe(c);
        }
      }
    }
  }
}

// The largest numbers of the format, and a huge next to tiny ones.
TEST(Rescue, ExtremeRows) {
  for (const DType t : {DType::bf16, DType::f32, DType::f64}) {
    const double largest = round_to(t, std::ldexp(1.99, format_of(t).max_exponent));
    const double least = decode(t, 1);
    const double patterns[][3] = {{largest, -largest, largest}, {largest, least, 0},
                                  {largest, 1, least},          {least, 0, -least},
                                  {least, 3 * least, 0},        {std::sqrt(largest), 1, largest}};
    for (const auto& pattern : patterns) {
      for (const std::int64_t length : {1, 3, 40, 1000}) {
        Case c;
        c.sizes = {1, length};
        c.x = c.y = tensor(t);
        c.eps = 0;
        ForwardProblem problem(c);
        for (std::int64_t i = 0; i < length; ++i) problem.x.set(i, pattern[i % 3]);
        problem.keep();
        for (const Implementation& f : implementations()) {
          const Errors errors = errors_of(c, problem.inputs(), f.run(problem));
          ASSERT_LE(errors.y, y_budget(c)) << pattern[0] << ',' << pattern[1] << ',' << pattern[2]
                                           << ' ' << f.name << ' ' << describe(c);
        }
      }
    }
  }
}

// Ordinary rows, rows to be rescued and rows beyond rescue next to each other, in place as well.
TEST(Rescue, MixedWithOrdinaryRows) {
  constexpr std::int64_t rows = 37, length = 45;
  for (const DType t : {DType::bf16, DType::f32, DType::f64}) {
    const Powers powers = normal_powers(t);
    for (int variant = 0; variant < 4; ++variant) {
      Case c;
      c.sizes = {rows, length};
      c.x = c.y = c.weight = tensor(t);
      c.rstd = tensor(c.rstd_type());
      c.eps = 0;
      if (variant == 1) c.y_over = Alias::x;
      if (variant >= 2) {
        c.residual = c.residual_out = tensor(t);
        c.residual_out_over = variant == 2 ? Alias::x : Alias::residual;
        c.y_over = variant == 2 ? Alias::residual : Alias::x;
      }
      ForwardProblem problem(c);
      for (std::int64_t row = 0; row < rows; ++row) {
        const int k = row % 5 == 0 ? powers.most - 1 : row % 3 == 0 ? powers.least + 2 : 0;
        for (std::int64_t i = row * length; i < (row + 1) * length; ++i) {
          problem.x.set(i, std::ldexp(round_to(DType::bf16, problem.x.value(i) / 4), k));
          if (variant >= 2) problem.residual.set(i, std::ldexp(problem.residual.value(i) / 4, k));
        }
      }
      problem.x.set(20 * length + 3, NAN);
      problem.keep();
      const Inputs in = problem.inputs();
      for (const Implementation& f : implementations()) {
        const Errors errors = errors_of(c, in, f.run(problem));
        EXPECT_LE(errors.y, y_budget(c)) << f.name << ' ' << describe(c);
        EXPECT_LE(errors.rstd, rstd_budget(c)) << f.name << ' ' << describe(c);
      }
    }
  }
}

// The rescued row's rstd is the one of the formula, as long as it is a number of its type.
TEST(Rescue, RstdIsThatOfTheRowItself) {
  for (const DType t : {DType::f32, DType::f64}) {
    const Powers powers = normal_powers(t);
    for (int k = powers.least + 3; k <= powers.most - 2; k += grid_is_small() ? 40 : 3) {
      Case c = scale_case(t, 0);
      c.rstd = tensor(t);
      ForwardProblem problem(c);
      fill(problem, k);
      const Errors errors = errors_of(c, problem.inputs(), implementations().back().run(problem));
      ASSERT_LE(errors.rstd, rstd_budget(c)) << "2^" << k << ' ' << describe(c);
    }
  }
}

// Half a unit from the formula where rstd has fewer bits than the roots that rows are scaled by.
void expect_rounded_once(const Case& c, ForwardProblem& problem) {
  const Inputs in = problem.inputs();
  for (const Implementation& f : implementations()) {
    const Errors errors = errors_of(c, in, f.run(problem));
    EXPECT_LE(errors.rstd, 0.501) << f.name << " eps " << c.eps << ' ' << describe(c);
  }
}

// Of rows of one element of so many bits that squares are exact.
TEST(Rescue, ADenormalRstdIsRoundedOnce) {
  for (const DType t : {DType::bf16, DType::f32, DType::f64}) {
    Case c;
    c.sizes = {500, 1};
    c.x = c.y = tensor(t);
    c.rstd = tensor(c.rstd_type());
    c.eps = 0;
    ForwardProblem problem(c);
    Random random(7);
    const Format format = format_of(c.compute_type());
    const int bits = std::min(format_of(t).precision, 26);
    for (std::int64_t row = 0; row < 500; ++row) {
      const double significand =
          static_cast<double>(1 + random.below(1 << (bits - 1))) * std::ldexp(1, 1 - bits) + 1;
      problem.x.set(row, std::ldexp(std::min(significand, 1.99),
                                    format.max_exponent - static_cast<int>(row % 2)));
    }
    problem.keep();
    expect_rounded_once(c, problem);
  }
}

// Down to the last bit, where eps or a given mean square is beyond the squares of floats.
TEST(Rescue, ADenormalRstdOfStatisticsIsRoundedOnce) {
  for (const DType t : {DType::f16, DType::bf16, DType::f32}) {
    for (const bool given : {false, true}) {
      Random random(8);
      for (int k = 252; k <= 302; ++k) {
        const double v = std::ldexp(1 + std::fabs(random.symmetric()), k);
        Case c;
        c.sizes = {3, 5};
        c.x = c.y = tensor(t);
        c.rstd = tensor(DType::f32);
        if (given) c.mean_square = tensor(DType::f64);
        c.eps = given ? 0 : v;
        ForwardProblem problem(c);
        for (std::int64_t row = 0; given && row < 3; ++row) {
          problem.mean_square.set(row, v * static_cast<double>(1 + row));
        }
        problem.keep();
        expect_rounded_once(c, problem);
      }
    }
  }
}

// The power of two between a row and its result may be more than two factors of floats hold.
TEST(Rescue, TheSmallestElementsOfTheSmallestMeanSquares) {
  for (int k = 240; k <= 300; k += 3) {
    for (const int sign : {-1, 1}) {
      Case c = scale_case(DType::f32, 0);
      c.mean_square = tensor(DType::f64);
      ForwardProblem problem(c);
      // From where x 2^k is the largest or the smallest of floats, or beyond.
      for (std::int64_t i = 0; i < problem.x.count(); ++i) {
        const int exponent =
            sign > 0 ? -149 + static_cast<int>(i % 24) : 127 - static_cast<int>(i % 24);
        problem.x.set(i, i % 7 == 0 ? 0 : std::ldexp(1, exponent));
      }
      for (std::int64_t row = 0; row < 2; ++row) {
        problem.mean_square.set(row, std::ldexp(1, -2 * sign * k));
      }
      problem.keep();
      const Inputs in = problem.inputs();
      for (const Implementation& f : implementations()) {
        const Results got = f.run(problem);
        for (std::size_t i = 0; i < in.x.size(); ++i) {
          const double exact = round_to(DType::f32, std::ldexp(in.x[i], sign * k));
          ASSERT_EQ(decode(DType::f32, got.y[i]), exact)
              << in.x[i] << " 2^" << sign * k << ' ' << f.name;
        }
      }
    }
  }
}

// A given mean square may have a root whose reciprocal leaves the compute type.
TEST(Rescue, GivenMeanSquares) {
  for (const DType t : {DType::f32, DType::f64}) {
    const Powers powers = normal_powers(t);
    for (int k = powers.least; k <= powers.most; k += grid_is_small() ? 40 : 5) {
      if (t == DType::f64 && (k < -500 || k > 500)) continue;  // the square must be a double
      Case c = scale_case(t, 1);
      c.mean_square = tensor(DType::f64);
      ForwardProblem problem(c);
      fill(problem, k);
      for (std::int64_t row = 0; row < 2; ++row)
        problem.mean_square.set(row, std::ldexp(4.2, 2 * k));
      problem.keep();
      for (const Implementation& f : implementations()) {
        const Errors errors = errors_of(c, problem.inputs(), f.run(problem));
        ASSERT_LE(errors.y, y_budget(c)) << "2^" << k << ' ' << f.name << ' ' << describe(c);
      }
    }
  }
}

// Results that are just finite or just normal, whatever the significand of rstd.
TEST(Rescue, GivenMeanSquaresAtTheEdgesOfTheComputeType) {
  constexpr double significands[] = {1, 1.3, 1.999, 2, 2.7, 3.999};
  for (const DType t : {DType::f32, DType::f64}) {
    const Format f = format_of(t);
    const int past = t == DType::f32 ? 70 : 520;
    for (const int k : {-past - 8, -past, past, past + 8}) {
      for (const double significand : significands) {
        Case c;
        c.sizes = {1, 24};
        c.x = c.y = tensor(t);
        c.mean_square = tensor(DType::f64);
        c.eps = 0;
        ForwardProblem problem(c);
        const double v = std::ldexp(significand, 2 * k);
        for (std::int64_t i = 0; i < problem.x.count(); ++i) {
          // Of y, from 0.47 to 0.99 of the largest number, and from one to two of the least normal.
          const double y = i % 2 == 0
                               ? std::ldexp(0.94 + 0.045 * static_cast<double>(i), f.max_exponent)
                               : std::ldexp(1 + 0.04 * static_cast<double>(i), f.min_exponent);
          const double x = std::ldexp(y * std::sqrt(significand), k);
          problem.x.set(i, std::isfinite(round_to(t, x)) ? x : 0);
        }
        problem.mean_square.set(0, v);
        problem.keep();
        for (const Implementation& implementation : implementations()) {
          const Results got = implementation.run(problem);
          const Errors errors = errors_of(c, problem.inputs(), got);
          ASSERT_LE(errors.y, y_budget(c)) << v << ' ' << implementation.name;
        }
      }
    }
  }
}

// rstd is 0, or so large that every element but zero becomes infinite.
TEST(Rescue, StatisticsBeyondTheComputeType) {
  for (const DType t : all_dtypes) {
    for (const double v : {1e-320, 1e-300, 1e-200, 1e-100, 1e60, 1e80, 1e100, 1e200, 1.7e308}) {
      for (const bool given : {false, true}) {
        Case c = scale_case(t, 1);
        c.rstd = tensor(c.rstd_type());
        if (given) c.mean_square = tensor(DType::f64);
        c.eps = given ? 0 : v;
        ForwardProblem problem(c);
        for (std::int64_t row = 0; given && row < 2; ++row) problem.mean_square.set(row, v);
        for (const std::int64_t i : {3, 200, 302}) problem.x.set(i, 0);
        problem.keep();
        for (const Implementation& f : implementations()) {
          const Errors errors = errors_of(c, problem.inputs(), f.run(problem));
          EXPECT_LE(errors.y, y_budget(c)) << v << ' ' << f.name << ' ' << describe(c);
          EXPECT_LE(errors.rstd, rstd_budget(c)) << v << ' ' << f.name << ' ' << describe(c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
