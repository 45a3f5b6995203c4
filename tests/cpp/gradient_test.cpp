// Results of backward, over every way to compute it that the program has.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "case_grid.hpp"
#include "gradient_implementations.hpp"
#include "implementations.hpp"

namespace rmsnorm_test {
namespace {

GradientCase plain_case(DType t, std::int64_t rows, std::int64_t n) {
  GradientCase c;
  c.forward.sizes = {rows, n};
  c.forward.x = c.forward.weight = c.dy = c.dx = c.dweight = c.dbias = tensor(t);
  return c;
}

void expect_exact(const GradientImplementation& f, BackwardProblem& problem) {
  const GradientInputs in = problem.inputs();  // before dx may overwrite one
  expect_gradients(problem.description(), in, f.run(problem), f.name);
}

TEST(Gradient, OverTheGrid) {
  const GradientImplementation& f = gradient_implementations().back();
  int turn = 0;
  for (const GradientCase& c : gradient_cases()) {
    if (turn++ % sampling() != 0) continue;
    BackwardProblem problem(c, f.workspace_bytes);
    expect_exact(f, problem);
    if (HasFailure()) break;
  }
}

TEST(Gradient, EveryImplementationGivesTheBitsOfTheFirst) {
  const std::vector<GradientImplementation>& all = gradient_implementations();
  if (all.size() == 1) return;
  for (const GradientCase& c : gradient_cases()) {
    BackwardProblem problem(c, all.front().workspace_bytes);
    const GradientResults expected = all.front().run(problem);
    for (std::size_t i = 1; i < all.size(); ++i) {
      expect_same(c, expected, all[i].run(problem), all[i].name);
    }
    if (HasFailure()) break;
  }
}

// Results in float are half an ulp from exact only where the arithmetic is in double.
TEST(Gradient, OneTensorOfDoublesMakesAllArithmeticDouble) {
  for (const GradientImplementation& f : gradient_implementations()) {
    GradientCase c = plain_case(DType::f32, 19, 100);
    c.forward.residual = c.d_residual = tensor(DType::f32);
    for (TensorSpec GradientCase::*t :
         {&GradientCase::dy, &GradientCase::d_residual, &GradientCase::dx, &GradientCase::dweight,
          &GradientCase::dbias}) {
      GradientCase wide = c;
      (wide.*t).dtype = DType::f64;
      BackwardProblem problem(wide, f.workspace_bytes);
      expect_exact(f, problem);
    }
    for (TensorSpec Case::*t : {&Case::x, &Case::residual, &Case::weight}) {
      GradientCase wide = c;
      (wide.forward.*t).dtype = DType::f64;
      BackwardProblem problem(wide, f.workspace_bytes);
      expect_exact(f, problem);
    }
  }
}

// What has kernels of its own in one layout goes through scratch memory in another.
TEST(Gradient, LayoutAndAlignmentDoNotChangeBits) {
  for (const GradientImplementation& f : gradient_implementations()) {
    for (const DType t : all_dtypes) {
      for (const DType w : {t, DType::f32}) {
        if (t == DType::f64 && w != t) continue;
        for (const bool given : {false, true}) {
          GradientCase c = plain_case(t, 21, 333);
          c.forward.weight = c.dweight = tensor(w);
          c.forward.rstd = TensorSpec{given, c.compute_type()};
          c.d_residual = TensorSpec{given, t};
          BackwardProblem plain(c, f.workspace_bytes);
          const GradientResults expected = f.run(plain);
          for (const Layout layout : output_layouts) {
            for (const int offset : {0, 1}) {
              GradientCase other = c;
              for (TensorSpec* s : {&other.dy, &other.forward.x, &other.d_residual, &other.dx,
                                    &other.forward.weight, &other.dweight, &other.dbias}) {
                s->layout = layout;
                s->offset = offset;
                s->shift = offset;
              }
              BackwardProblem problem(other, f.workspace_bytes);
              expect_same(other, expected, f.run(problem), f.name);
            }
          }
        }
      }
    }
  }
}

// Scaled rows beside ordinary ones, with rstd computed, and given but of no use.
TEST(Gradient, OfHugeAndTinyRows) {
  for (const GradientImplementation& f : gradient_implementations()) {
    for (const DType t : {DType::bf16, DType::f32, DType::f64}) {
      const int exponent = format_of(t).max_exponent - 4;
      for (const bool given : {false, true}) {
        GradientCase c = plain_case(t, 6, 70);
        c.forward.eps = 0;
        c.forward.rstd = TensorSpec{given, c.compute_type()};
        BackwardProblem problem(c, f.workspace_bytes);
        for (std::int64_t row = 0; row < 6; ++row) {
          const int scale = row % 3 == 0 ? 0 : row % 3 == 1 ? exponent : 8 - exponent;
          for (std::int64_t i = row * 70; i < (row + 1) * 70; ++i) {
            problem.x.set(i, std::ldexp(problem.x.value(i) / 4, scale));
            // So that dx = dy / x stays in range.
            problem.dy.set(i, std::ldexp(problem.dy.value(i), scale > 0 ? 6 : scale / 2));
          }
          if (given && scale != 0) problem.rstd.set(row, scale > 0 ? 0 : HUGE_VAL);
        }
        problem.keep();
        expect_exact(f, problem);
      }
    }
  }
}

TEST(Gradient, ANaNStaysInItsRowAndReachesTheSums) {
  for (const GradientImplementation& f : gradient_implementations()) {
    for (const DType t : all_dtypes) {
      const GradientCase c = plain_case(t, 3, 40);
      BackwardProblem problem(c, f.workspace_bytes);
      const GradientResults before = f.run(problem);
      problem.x.set(40 + 7, NAN);
      problem.keep();
      const GradientResults after = f.run(problem);
      for (std::size_t i = 0; i < 120; ++i) {
        const bool in_row = i / 40 == 1;
        EXPECT_EQ(is_nan(t, after.dx[i]), in_row) << f.name << ' ' << i << ' ' << describe(c);
        if (in_row) continue;
        EXPECT_EQ(before.dx[i], after.dx[i]) << f.name << ' ' << describe(c);
      }
      for (std::size_t i = 0; i < 40; ++i) EXPECT_TRUE(is_nan(t, after.dweight[i])) << f.name;
      EXPECT_EQ(before.dbias, after.dbias) << f.name << ' ' << describe(c);
    }
  }
}

// ---- factors that are not finite ----

enum class Kind { nan, negative_infinity, negative, zero, positive, infinity };

Kind kind_of(double v) {
  if (std::isnan(v)) return Kind::nan;
  if (std::isinf(v)) return v < 0 ? Kind::negative_infinity : Kind::infinity;
  return v < 0 ? Kind::negative : v > 0 ? Kind::positive : Kind::zero;
}

// The formula of one row by the operations of the compute type, in ascending order: whether a
// result is NaN or infinite does not depend on the order as long as finite sums stay in range.
GradientResults of_formula(const GradientCase& c, const GradientInputs& in) {
  const DType t = c.compute_type();
  const auto rounded = [t](double v) { return round_to(t, v); };
  const bool given = c.forward.mean_square.present;
  const std::size_t count = in.x.size();
  double mean = 0;
  for (const double x : in.x) mean += x * x / static_cast<double>(count);
  const double root = std::sqrt((given ? in.mean_square[0] : mean) + c.forward.eps);
  std::vector<double> g(count), xhat(count);
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) {
    // The double holds roots whose reciprocals leave the compute type, as scaled rows do.
    xhat[i] = rounded(in.x[i] / root);
    const double w = c.forward.weight.present ? in.weight[i] : 1;
    g[i] = rounded(in.dy[i] * rounded(w + rounded(c.forward.weight_offset)));
    sum += g[i] * xhat[i];
  }
  const double factor = rounded(sum / static_cast<double>(count));
  GradientResults results;
  for (std::size_t i = 0; i < count; ++i) {
    const double d = given ? g[i] : std::fma(-factor, xhat[i], g[i]);
    results.dx.push_back(encode(c.dx.dtype, round_to(c.dx.dtype, d / root)));
    results.dweight.push_back(
        encode(c.dweight.dtype, round_to(c.dweight.dtype, in.dy[i] * xhat[i])));
  }
  if (given) {
    const double rstd = 1 / root;
    const DType out = c.d_mean_square.dtype;
    results.d_mean_square = {encode(out, round_to(out, -0.5 * rstd * sum * rstd))};
  }
  return results;
}

void expect_kinds(const GradientCase& c, const char* what, DType t,
                  const std::vector<std::uint64_t>& expected, const std::vector<std::uint64_t>& got,
                  const std::string& name) {
  ASSERT_EQ(expected.size(), got.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(kind_of(decode(t, got[i])), kind_of(decode(t, expected[i])))
        << name << ' ' << what << '[' << i << "] is " << decode(t, got[i]) << ", expected "
        << decode(t, expected[i]) << "; " << describe(c);
  }
}

// In every layout, some of which have no kernel of their own.
void expect_formula(GradientCase c, const std::function<void(BackwardProblem&)>& set) {
  for (const Layout layout : {Layout::contiguous, Layout::inner_stride_two}) {
    c.forward.x.layout = layout;
    for (const GradientImplementation& f : gradient_implementations()) {
      BackwardProblem problem(c, f.workspace_bytes);
      set(problem);
      problem.keep();
      const GradientResults expected = of_formula(c, problem.inputs());
      const GradientResults got = f.run(problem);
      expect_kinds(c, "dx", c.dx.dtype, expected.dx, got.dx, f.name);
      expect_kinds(c, "dweight", c.dweight.dtype, expected.dweight, got.dweight, f.name);
      expect_kinds(c, "d_mean_square", c.d_mean_square.dtype, expected.d_mean_square,
                   got.d_mean_square, f.name);
    }
  }
}

constexpr std::int64_t lengths_with_rests[] = {1, 2, 8, 31, 32, 33, 255, 256, 257, 2500};

// Which products of a row are negative; with a zero among them, whose product with infinity is NaN.
double signed_value(int signs, std::int64_t i, std::int64_t n) {
  if (signs == 2 && i == n / 2) return 0;
  return signs == 1 && i % 3 == 1 ? -0.5 : 0.5;
}

TEST(Gradient, GivenMeanSquaresMayBeAnything) {
  constexpr double infinity = HUGE_VAL;
  int turn = 0;
  for (const DType t : all_dtypes) {
    for (const std::int64_t n : lengths_with_rests) {
      for (const double mean_square :
           {0.0, -0.0, infinity, static_cast<double>(NAN), -1.0, 0x1p-1074, 1e-310, 1e-42}) {
        for (const int signs : {0, 1, 2}) {
          if (grid_is_small() && ++turn % 7 != 0) continue;
          GradientCase c = plain_case(t, 1, n);
          c.forward.mean_square = c.d_mean_square = tensor(DType::f64);
          c.forward.eps = 0;
          expect_formula(c, [&](BackwardProblem& problem) {
            problem.mean_square.set(0, mean_square);
            for (std::int64_t i = 0; i < n; ++i) {
              problem.x.set(i, signed_value(signs, i, n));
              problem.dy.set(i, 0.25);
              problem.weight.set(i, 1);
            }
          });
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// A product that is infinite makes c infinite, whatever lies behind the row's end.
TEST(Gradient, OneInfiniteGradient) {
  for (const DType t : all_dtypes) {
    for (const std::int64_t n : lengths_with_rests) {
      for (const int signs : {0, 1}) {
        expect_formula(plain_case(t, 1, n), [&](BackwardProblem& problem) {
          for (std::int64_t i = 0; i < n; ++i) {
            problem.x.set(i, signed_value(signs, i, n));
            problem.dy.set(i, i == n / 2 ? HUGE_VAL : 0.25);
            problem.weight.set(i, 1);
          }
        });
        if (HasFatalFailure()) return;
      }
    }
  }
}

// An offset that the compute type does not hold.
TEST(Gradient, AnInfiniteWeightOffset) {
  for (const DType t : {DType::f16, DType::bf16, DType::f32}) {
    for (const std::int64_t n : lengths_with_rests) {
      for (const int signs : {0, 1}) {
        GradientCase c = plain_case(t, 1, n);
        c.forward.weight_offset = 1e300;
        c.forward.mean_square = c.d_mean_square = tensor(DType::f64);
        expect_formula(c, [&](BackwardProblem& problem) {
          problem.mean_square.set(0, 1);
          for (std::int64_t i = 0; i < n; ++i) {
            problem.x.set(i, signed_value(signs, i, n));
            problem.dy.set(i, 0.25);
          }
        });
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Gradient, OfNothingIsZero) {
  for (const GradientImplementation& f : gradient_implementations()) {
    for (const DType t : all_dtypes) {
      for (const std::vector<std::int64_t>& sizes :
           {std::vector<std::int64_t>{0, 9}, {3, 0}, {0, 4, 9}, {4, 0, 9}}) {
        for (const Broadcast broadcast : {Broadcast::shared, Broadcast::per_head}) {
          GradientCase c = plain_case(t, 0, 9);
          c.forward.sizes = sizes;
          c.forward.broadcast = broadcast;
          BackwardProblem problem(c, f.workspace_bytes);
          const GradientResults got = f.run(problem);
          for (const std::uint64_t bits : got.dweight) EXPECT_EQ(bits, 0u) << describe(c);
          for (const std::uint64_t bits : got.dbias) EXPECT_EQ(bits, 0u) << describe(c);
        }
      }
    }
  }
}

TEST(Gradient, OverEachInputIsThatInMemoryOfItsOwn) {
  for (const GradientImplementation& f : gradient_implementations()) {
    for (const DType t : all_dtypes) {
      for (const std::int64_t n : {33, 700}) {
        GradientCase c = plain_case(t, 19, n);
        c.forward.residual = c.d_residual = tensor(t);
        BackwardProblem apart(c, f.workspace_bytes);
        const GradientResults expected = f.run(apart);
        for (const GradientAlias alias : {GradientAlias::dy, GradientAlias::x,
                                          GradientAlias::residual, GradientAlias::d_residual}) {
          c.dx_over = alias;
          BackwardProblem problem(c, f.workspace_bytes);
          expect_same(c, expected, f.run(problem), f.name);
        }
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
