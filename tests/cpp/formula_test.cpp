// Every rounding of the contract, bit for bit: the library's rstd goes through the emulated formula
// and must come out as the library's y.
#include "formula.hpp"

#include <gtest/gtest.h>

#include "case_grid.hpp"
#include "implementations.hpp"

namespace rmsnorm_test {
namespace {

std::vector<double> values(DType t, const std::vector<std::uint64_t>& bits) {
  std::vector<double> v;
  for (const std::uint64_t b : bits) v.push_back(decode(t, b));
  return v;
}

void expect_formula(const Case& c, const Implementation& f) {
  Case with_rstd = c;
  if (!c.rstd.present) with_rstd.rstd = tensor(c.rstd_type());
  ForwardProblem problem(with_rstd);
  const Inputs in = problem.inputs();
  const Results got = f.run(problem);
  Results expected = emulate(with_rstd, in, values(with_rstd.rstd.dtype, got.rstd));
  expected.rstd = got.rstd;
  if (c.mean_square.present) {
    for (std::size_t r = 0; r < got.rstd.size(); ++r) {
      const long double exact = rstd_of_mean_square(c, in.mean_square[r]);
      // Correct rounding, as far as extended precision can tell.
      EXPECT_LE(ulp_error(c.rstd_type(), exact, decode(c.rstd_type(), got.rstd[r])), 0.502)
          << describe(c);
    }
  }
  expect_same(with_rstd, expected, got, f.name);
  if (c.rstd.present) return;
  expected.rstd.clear();
  ForwardProblem unasked(c);
  expect_same(c, expected, f.run(unasked), f.name);
}

TEST(Formula, HoldsOverTheGrid) {
  for (const Case& c : all_cases()) {
    expect_formula(c, implementations().front());
    if (HasFailure()) break;
  }
}

// x, residual, weight, bias, y and residual_out in every mix of the four dtypes, present and
// absent.
TEST(Formula, HoldsForEveryMixOfDtypes) {
  std::vector<TensorSpec> any;
  for (const DType t : all_dtypes) any.push_back(tensor(t));
  std::vector<TensorSpec> optional = any;
  optional.push_back(TensorSpec{});
  const std::vector<Implementation>& all = implementations();
  const int every = grid_is_small() ? 211 : sampling();
  int turn = 0;
  Case c;
  c.sizes = {2, 37};
  for (const TensorSpec& x : any) {
    for (const TensorSpec& residual : optional) {
      for (const TensorSpec& residual_out : optional) {
        if (residual_out.present && !residual.present) continue;
        for (const TensorSpec& weight : optional) {
          for (const TensorSpec& bias : optional) {
            for (const TensorSpec& y : any) {
              for (const Rounding rounding :
                   {Rounding::once, Rounding::before_weight, Rounding::rstd}) {
                if (++turn % every != 0) continue;
                c.x = x;
                c.residual = residual;
                c.residual_out = residual_out;
                c.weight = weight;
                c.bias = bias;
                c.y = y;
                c.rounding = rounding;
                c.round_residual = turn % 5 != 0;
                c.weight_offset = weight.present && turn % 7 == 0 ? 1 : 0;
                c.rstd = tensor(c.rstd_type());
                expect_formula(c, all[static_cast<std::size_t>(turn) % all.size()]);
                if (HasFailure()) return;
              }
            }
          }
        }
      }
    }
  }
}

// Offsets that are neither 0 nor 1, one of which changes nothing but the dtype of the weight.
TEST(Formula, HoldsForOddWeightOffsets) {
  for (const double offset : {-1.0, 0.3, 1e-30, 1024.0, -0.0}) {
    for (const DType t : all_dtypes) {
      for (const Rounding rounding : {Rounding::once, Rounding::before_weight, Rounding::rstd}) {
        Case c;
        c.sizes = {2, 70};
        c.x = c.weight = c.y = tensor(t);
        c.weight_offset = offset;
        c.rounding = rounding;
        for (const Implementation& f : implementations()) expect_formula(c, f);
      }
    }
  }
}

// A weight of -0 or a bias of -0 keeps the sign that the formula gives.
TEST(Formula, KeepsTheSignOfZero) {
  for (const DType t : all_dtypes) {
    for (const bool with_weight : {false, true}) {
      for (const bool with_bias : {false, true}) {
        for (const double offset : {0.0, 1.0}) {
          Case c;
          c.sizes = {1, 40};
          c.x = c.y = tensor(t);
          c.weight = TensorSpec{with_weight, t};
          c.bias = TensorSpec{with_bias, t};
          c.weight_offset = with_weight ? offset : 0;
          c.rstd = tensor(c.rstd_type());
          ForwardProblem problem(c);
          for (std::int64_t i = 0; i < 40; ++i) {
            problem.x.set(i, i % 3 == 0 ? 1.0 : i % 3 == 1 ? 0.0 : -0.0);
            if (with_weight) problem.weight.set(i, i % 2 == 0 ? -1.0 : -0.0);
            if (with_bias) problem.bias.set(i, i % 5 < 2 ? 0.0 : -0.0);
          }
          problem.keep();
          const Inputs in = problem.inputs();
          for (const Implementation& f : implementations()) {
            const Results got = f.run(problem);
            Results expected = emulate(c, in, values(c.rstd.dtype, got.rstd));
            expected.rstd = got.rstd;
            expect_same(c, expected, got, f.name);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
