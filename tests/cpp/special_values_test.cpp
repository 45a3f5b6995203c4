// Rows with NaN, infinities, zeros and denormals, and rows of no elements.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "formula.hpp"
#include "implementations.hpp"

namespace rmsnorm_test {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t n = 77;

Case plain(DType t) {
  Case c;
  c.sizes = {1, n};
  c.x = c.weight = c.y = tensor(t);
  c.rstd = tensor(c.rstd_type());
  return c;
}

TEST(SpecialValues, ANanMakesItsRowNan) {
  for (const DType t : all_dtypes) {
    for (const std::int64_t place : {std::int64_t{0}, std::int64_t{40}, n - 1}) {
      const Case c = plain(t);
      ForwardProblem problem(c);
      problem.x.set(place, NAN);
      problem.keep();
      for (const Implementation& f : implementations()) {
        const Results got = f.run(problem);
        EXPECT_TRUE(is_nan(c.rstd.dtype, got.rstd[0])) << f.name << ' ' << describe(c);
        for (const std::uint64_t y : got.y) {
          ASSERT_TRUE(is_nan(t, y) && !is_signalling_nan(t, y)) << f.name << ' ' << describe(c);
        }
      }
    }
  }
}

TEST(SpecialValues, ANanBeyondThePartIsAloneInItsRow) {
  for (const DType t : all_dtypes) {
    Case c = plain(t);
    c.partial = 0.5;
    ForwardProblem problem(c);
    problem.x.set(39, NAN);  // ceil(38.5) elements count: 0 ... 38
    problem.keep();
    for (const Implementation& f : implementations()) {
      const Results got = f.run(problem);
      EXPECT_FALSE(is_nan(c.rstd.dtype, got.rstd[0]));
      for (std::int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(is_nan(t, got.y[static_cast<std::size_t>(i)]), i == 39) << f.name << ' ' << i;
      }
    }
  }
}

// mean_square is infinite, rstd zero: finite elements become zero, infinite ones NaN.
TEST(SpecialValues, AnInfinityTurnsTheOthersToZero) {
  for (const DType t : all_dtypes) {
    const Case c = plain(t);
    ForwardProblem problem(c);
    problem.x.set(50, -infinity);
    problem.keep();
    for (const Implementation& f : implementations()) {
      const Results got = f.run(problem);
      EXPECT_EQ(decode(c.rstd.dtype, got.rstd[0]), 0.0);
      for (std::int64_t i = 0; i < n; ++i) {
        const double y = decode(t, got.y[static_cast<std::size_t>(i)]);
        ASSERT_TRUE(i == 50 ? std::isnan(y) : y == 0) << f.name << ' ' << i << ' ' << describe(c);
      }
    }
  }
}

TEST(SpecialValues, ARowOfZeros) {
  for (const DType t : all_dtypes) {
    for (const double eps : {0.0, 1e-6}) {
      Case c = plain(t);
      c.eps = eps;
      ForwardProblem problem(c);
      for (std::int64_t i = 0; i < n; ++i) problem.x.set(i, i % 2 == 0 ? 0.0 : -0.0);
      problem.keep();
      for (const Implementation& f : implementations()) {
        const Results got = f.run(problem);
        const double rstd = decode(c.rstd.dtype, got.rstd[0]);
        if (eps == 0) {
          EXPECT_EQ(rstd, infinity);
        } else {
          EXPECT_NEAR(rstd, 1000, 1e-3);
        }
        for (std::int64_t i = 0; i < n; ++i) {
          const double y = decode(t, got.y[static_cast<std::size_t>(i)]);
          ASSERT_TRUE(eps == 0 ? std::isnan(y) : y == 0 && std::signbit(y) == (i % 2 != 0))
              << f.name << ' ' << describe(c);
        }
      }
    }
  }
}

// Denormal inputs and outputs of every dtype keep their bits of precision.
TEST(SpecialValues, DenormalsAreNumbers) {
  for (const DType t : all_dtypes) {
    const double least = decode(t, 1);
    Case c = plain(t);
    c.eps = 1;
    ForwardProblem problem(c);
    for (std::int64_t i = 0; i < n; ++i) {
      problem.x.set(i, least * static_cast<double>(i - 38));
      problem.weight.set(i, 1);
    }
    problem.keep();
    for (const Implementation& f : implementations()) {
      const Results got = f.run(problem);
      for (std::int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(decode(t, got.y[static_cast<std::size_t>(i)]),
                  least * static_cast<double>(i - 38))
            << f.name << ' ' << describe(c);
      }
    }
  }
}

TEST(SpecialValues, OutputsBeyondTheRangeAreInfinite) {
  for (const DType t : {DType::f16, DType::bf16}) {
    Case c = plain(t);
    c.weight = tensor(DType::f32);
    ForwardProblem problem(c);
    for (std::int64_t i = 0; i < n; ++i) {
      problem.x.set(i, i % 2 == 0 ? 1 : -1);
      problem.weight.set(i, 3.4e38);
    }
    problem.keep();
    for (const Implementation& f : implementations()) {
      const Results got = f.run(problem);
      for (std::int64_t i = 0; i < n; ++i) {
        const double y = decode(t, got.y[static_cast<std::size_t>(i)]);
        ASSERT_EQ(y, i % 2 == 0 ? infinity : -infinity) << f.name << ' ' << describe(c);
      }
    }
  }
}

TEST(SpecialValues, GivenMeanSquaresMayBeAnything) {
  for (const DType t : all_dtypes) {
    for (const double mean_square : {0.0, infinity, static_cast<double>(NAN), -1.0}) {
      Case c = plain(t);
      c.mean_square = tensor(DType::f32);
      c.eps = 0;
      ForwardProblem problem(c);
      problem.mean_square.set(0, mean_square);
      for (std::int64_t i = 0; i < n; ++i) problem.x.set(i, static_cast<double>(i));
      problem.keep();
      const double expected = 1 / std::sqrt(mean_square);
      for (const Implementation& f : implementations()) {
        const Results got = f.run(problem);
        const double rstd = decode(c.rstd.dtype, got.rstd[0]);
        EXPECT_TRUE(std::isnan(expected) ? std::isnan(rstd) : rstd == expected)
            << f.name << ' ' << rstd << ' ' << describe(c);
      }
    }
  }
}

// No elements to normalise, whether or not there are rows; pointers may then be null.
TEST(SpecialValues, EmptyTensors) {
  for (const std::vector<std::int64_t>& sizes :
       {std::vector<std::int64_t>{0, 5}, {3, 0}, {0, 0}, {0}, {2, 0, 3}}) {
    for (const DType t : all_dtypes) {
      rmsnorm::ForwardParams p;
      p.x.rank = static_cast<std::int32_t>(sizes.size());
      p.x.dtype = t;
      std::int64_t stride = 1;
      for (std::size_t d = sizes.size(); d-- > 0;) {
        p.x.sizes[d] = sizes[d];
        p.x.strides[d] = stride;
        stride *= std::max<std::int64_t>(sizes[d], 1);  // as NumPy and torch have it
      }
      p.y.rank = p.x.rank;
      p.y.dtype = t;
      for (std::size_t d = 0; d < sizes.size(); ++d) {
        p.y.sizes[d] = p.x.sizes[d];
        p.y.strides[d] = p.x.strides[d];
      }
      p.residual = p.x;
      p.residual_out = p.y;
      for (const Implementation& f : implementations()) {
        EXPECT_TRUE(f.forward(p).ok()) << f.name;
      }
    }
  }
}

// The stride of a dimension of one is ignored, whatever it is.
TEST(SpecialValues, StridesOfSizeOneMayBeAnything) {
  for (const DType t : all_dtypes) {
    for (const std::int64_t stride : {std::int64_t{0}, std::int64_t{1} << 62, INT64_MIN}) {
      Case c = plain(t);
      c.sizes = {1, 1, 40, 1};
      c.axis = 1;
      ForwardProblem problem(c);
      const Results expected = implementations().front().run(problem);
      const auto set_strides = [stride](rmsnorm::ForwardParams& p) {
        for (const int d : {0, 1, 3}) p.x.strides[d] = p.y.strides[d] = stride;
        p.weight.strides[0] = p.weight.strides[2] = p.rstd.strides[0] = stride;
      };
      for (const Implementation& f : implementations()) {
        expect_same(c, expected, f.run(problem, set_strides), f.name);
      }
    }
  }
}

// 1 / sqrt(eps) may be beyond the compute type, and zero times infinity is no zero.
TEST(SpecialValues, RowsOfZerosAreZeroUnderAnyPositiveEpsilon) {
  for (const DType t : all_dtypes) {
    for (const double eps : {1e-300, 1e-80, 1e-40, 1e-6, 1e100}) {
      Case c;
      c.sizes = {2, 37};
      c.x = c.y = c.weight = tensor(t);
      c.eps = eps;
      ForwardProblem problem(c);
      for (std::int64_t i = 0; i < 37; ++i) problem.x.set(i, 0);
      problem.keep();
      for (const Implementation& f : implementations()) {
        const Results got = f.run(problem);
        for (std::size_t i = 0; i < 37; ++i) {
          EXPECT_EQ(decode(t, got.y[i]), 0) << f.name << " eps " << eps << ' ' << describe(c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
