// mean_square, by itself and as the statistics of forward.
#include <gtest/gtest.h>

#include <cmath>

#include "formula.hpp"
#include "instruction_sets.hpp"

namespace rmsnorm_test {
namespace {

struct MeanSquareProblem {
  MeanSquareProblem(DType t, DType out_type, std::vector<std::int64_t> sizes, std::int32_t first,
                    Layout layout, double part) {
    description.sizes = sizes;
    description.axis = first;
    description.partial = part;
    const int outer = description.outer();
    const std::vector<std::int64_t> row_sizes(sizes.begin(), sizes.begin() + outer);
    x = GuardedTensor(t, sizes, strides_of(layout, sizes, outer), 1, 0);
    out = GuardedTensor(out_type, row_sizes, strides_of(layout, row_sizes, outer), 0, 8);
    Random random(29);
    for (std::int64_t i = 0; i < x.count(); ++i) x.set(i, random.bell());
    x.remember();
    out.remember();
  }
  rmsnorm::MeanSquareParams params() {
    rmsnorm::MeanSquareParams p;
    p.x = x.view();
    p.mean_square = out.view();
    p.axis = description.axis;
    p.partial = description.partial;
    return p;
  }
  std::vector<std::uint64_t> run(Isa isa, const std::vector<Range>& rows) {
    out.restore();
    for (const Range& r : rows) {
      EXPECT_TRUE(rmsnorm::cpu::mean_square(params(), r.first, r.second, isa).ok());
    }
    EXPECT_FALSE(x.written_outside({}));
    EXPECT_FALSE(out.written_outside(rows));
    std::vector<std::uint64_t> bits;
    for (std::int64_t i = 0; i < out.count(); ++i) bits.push_back(out.bits(i));
    return bits;
  }
  Case description;
  GuardedTensor x, out;
};

TEST(MeanSquare, IsExactAndTheSameEverywhere) {
  for (const DType t : all_dtypes) {
    for (const DType out : {DType::f32, DType::f64}) {
      for (const Layout layout : output_layouts) {
        for (const double partial : {1.0, 0.3}) {
          for (const std::int64_t n : {1, 33, 257, 900}) {
            MeanSquareProblem problem(t, out, {2, 3, n}, -1, layout, partial);
            const std::vector<std::uint64_t> expected = problem.run(Isa::scalar, {{0, 6}});
            Inputs in;
            for (std::int64_t i = 0; i < problem.x.count(); ++i) in.x.push_back(problem.x.value(i));
            const std::vector<long double> exact =
                exact_mean_squares(problem.description, in, Normalised{in.x, {}, t});
            // f32 sums are worth 22 bits, f64 sums 51; an f32 result rounds once more.
            const double budget =
                t == DType::f64 ? (out == DType::f64 ? 2 : 0.51) : (out == DType::f64 ? 0x1p31 : 2);
            for (std::size_t row = 0; row < 6; ++row) {
              EXPECT_LE(ulp_error(out, exact[row], decode(out, expected[row])), budget)
                  << describe(problem.description) << ' ' << rmsnorm::name(t);
            }
            for (const Isa isa : available_isas()) {
              EXPECT_EQ(problem.run(isa, {{0, 6}}), expected) << name(isa);
              EXPECT_EQ(problem.run(isa, {{4, 6}, {0, 0}, {0, 4}}), expected) << name(isa);
            }
            problem.run(Isa::scalar, {{2, 3}});
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
    EXPECT_EQ(many.run(Isa::scalar, {{0, 3}}), one.run(Isa::scalar, {{0, 3}}));
    EXPECT_EQ(all.run(Isa::scalar, {{0, 1}}).size(), 1u);
  }
}

// forward over a row whose shards' mean squares were averaged elsewhere. y is f32 for 16-bit x,
// since from 16 to 16 bits forward sums in float lanes and mean_square does not.
TEST(MeanSquare, GivesForwardItsOwnStatistics) {
  for (const DType t : all_dtypes) {
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
    long double exact = 0;
    for (std::int64_t i = 0; i < 300; ++i) {
      problem.x.set(i, std::ldexp(1 + static_cast<double>(i % 7) / 8, k));
      exact += static_cast<long double>(problem.x.value(i)) * problem.x.value(i) / 300;
    }
    problem.x.remember();
    for (const Isa isa : available_isas()) {
      const double got = decode(DType::f64, problem.run(isa, {{0, 1}})[0]);
      EXPECT_LE(ulp_error(DType::f64, exact, got), 0x1p31) << k << ' ' << name(isa);
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
