// Conversions: the tests' own, and through forward those of every instruction set, over all bit
// patterns of the 16-bit formats and all places where rounding turns.
#include "float_formats.hpp"
#include "case_grid.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "formula.hpp"
#include "instruction_sets.hpp"

namespace rmsnorm_test {
namespace {

constexpr DType halves[] = {DType::f16, DType::bf16};
constexpr std::int64_t pattern_count = 65536;

// All patterns, or in the small grid every seventh.
std::int64_t pattern_step() { return grid_is_small() ? 7 : 1; }

TEST(FloatFormats, EveryPatternRoundTrips) {
  for (const DType t : halves) {
    for (std::uint64_t bits = 0; bits < pattern_count; ++bits) {
      const double v = decode(t, bits);
      if (is_nan(t, bits)) {
        ASSERT_TRUE(std::isnan(v));
      } else {
        ASSERT_EQ(encode(t, v), bits);
        ASSERT_EQ(round_to(t, v), v);
      }
    }
  }
}

TEST(FloatFormats, KnownValues) {
  EXPECT_EQ(decode(DType::f16, 0x3c00), 1.0);
  EXPECT_EQ(decode(DType::f16, 0x0001), 0x1p-24);
  EXPECT_EQ(decode(DType::f16, 0x7bff), 65504.0);
  EXPECT_EQ(decode(DType::f16, 0xfc00), -std::numeric_limits<double>::infinity());
  EXPECT_EQ(decode(DType::bf16, 0x3f80), 1.0);
  EXPECT_EQ(decode(DType::bf16, 0x0001), 0x1p-133);
  EXPECT_EQ(decode(DType::bf16, 0x7f7f), 0x1.fep127);
  EXPECT_TRUE(std::isnan(decode(DType::bf16, 0x7f81)));
  EXPECT_EQ(round_to(DType::f16, 65519.99), 65504.0);
  EXPECT_EQ(round_to(DType::f16, 65520.0), std::numeric_limits<double>::infinity());
  EXPECT_EQ(round_to(DType::f16, 2049.0), 2048.0);
  EXPECT_EQ(round_to(DType::f16, 2051.0), 2052.0);
  EXPECT_EQ(round_to(DType::f16, 0x1p-25), 0.0);
  EXPECT_EQ(round_to(DType::f16, 0x1.8p-24), 0x1p-23);
  EXPECT_EQ(round_to(DType::bf16, 257.0), 256.0);
  EXPECT_EQ(encode(DType::f32, -0.0), 0x80000000u);
}

// forward on one long row that it does not need to normalise: residual_out = cast(x + -0), y =
// cast(x).
struct Conversion {
  Conversion(DType from, DType to, std::int64_t n) : problem(description(from, to, n)) {
    for (std::int64_t i = 0; i < n; ++i) problem.residual.set(i, -0.0);
    problem.mean_square.set(0, 1);
  }
  static Case description(DType from, DType to, std::int64_t n) {
    Case c;
    c.sizes = {1, n};
    c.x = c.residual = tensor(from);
    c.residual_out = c.y = tensor(to);
    c.mean_square = tensor(DType::f64);
    c.eps = 0;
    return c;
  }
  ForwardProblem problem;
};

void expect_conversion(Conversion& conversion, DType from, DType to) {
  conversion.problem.keep();
  const Case& c = conversion.problem.description();
  for (const Isa isa : available_isas()) {
    const Results got = conversion.problem.run(isa);
    if (!result_is_checked(c)) continue;
    for (std::size_t i = 0; i < got.y.size(); ++i) {
      const std::uint64_t bits = conversion.problem.x.bits(static_cast<std::int64_t>(i));
      const std::uint64_t expected = encode(to, round_to(to, decode(from, bits)));
      for (const std::uint64_t out : {got.residual_out[i], got.y[i]}) {
        ASSERT_TRUE(same(to, expected, out))
            << name(isa) << ": 0x" << std::hex << bits << " became 0x" << out << ", expected 0x"
            << expected << "; " << describe(c);
        ASSERT_FALSE(is_signalling_nan(to, out)) << name(isa) << ": 0x" << std::hex << out;
      }
    }
  }
}

TEST(LibraryConversions, WidenEveryPattern) {
  for (const DType from : halves) {
    for (const DType to : all_dtypes) {
      const std::int64_t n = pattern_count / pattern_step();
      Conversion conversion(from, to, n);
      for (std::int64_t i = 0; i < n; ++i) {
        conversion.problem.x.set_bits(i, static_cast<std::uint64_t>(i * pattern_step()));
      }
      expect_conversion(conversion, from, to);
    }
  }
}

// Each value of the narrow format, the midpoint to its neighbour, and what lies next to both.
std::vector<double> turning_points(DType to, DType from, std::uint64_t begin, std::uint64_t end) {
  const auto every = static_cast<std::uint64_t>(pattern_step());
  std::vector<double> points;
  for (std::uint64_t bits = begin; bits < end; bits += every) {
    const double v = decode(to, bits);
    if (!std::isfinite(v)) continue;
    const double next = decode(to, bits + 1);
    const double step = std::isfinite(next) ? next - v : v - decode(to, bits - 1);
    for (const double p : {v, v + step / 2}) {
      if (from == DType::f64) {
        for (const double toward : {-INFINITY, INFINITY})
          points.push_back(std::nextafter(p, toward));
      } else {
        for (const float toward : {-INFINITY, INFINITY}) {
          points.push_back(std::nextafter(static_cast<float>(p), toward));
        }
      }
      points.push_back(p);
    }
  }
  return points;
}

TEST(LibraryConversions, NarrowToNearestEvenAtEveryTurningPoint) {
  for (const DType to : halves) {
    for (const DType from : {DType::f32, DType::f64}) {
      const std::vector<double> points = turning_points(to, from, 0, 0x8000);
      const auto n = static_cast<std::int64_t>(points.size());
      for (const double sign : {1.0, -1.0}) {
        Conversion conversion(from, to, n);
        for (std::int64_t i = 0; i < n; ++i) {
          conversion.problem.x.set(i, sign * points[static_cast<std::size_t>(i)]);
        }
        expect_conversion(conversion, from, to);
        if (grid_is_small()) break;
      }
    }
  }
}

TEST(LibraryConversions, NarrowDoubleToFloat) {
  std::vector<double> points;
  for (std::uint64_t exponent = 0; exponent < 0xff; ++exponent) {
    for (const std::uint64_t fraction : {0x0u, 0x1u, 0x7ffffeu, 0x7fffffu}) {
      const std::uint64_t bits = (exponent << 23) | fraction;
      const std::vector<double> more = turning_points(DType::f32, DType::f64, bits, bits + 1);
      points.insert(points.end(), more.begin(), more.end());
    }
  }
  for (const double p : {1e39, 1e300, 0x1p-150, 0x1p-1074}) points.push_back(p);
  const auto n = static_cast<std::int64_t>(points.size());
  Conversion conversion(DType::f64, DType::f32, n);
  for (std::int64_t i = 0; i < n; ++i) {
    conversion.problem.x.set(i, points[static_cast<std::size_t>(i)]);
  }
  expect_conversion(conversion, DType::f64, DType::f32);
}

// A payload whose low bits alone are set disappears when truncated; one of all ones carries into
// the exponent and beyond when rounded.
TEST(LibraryConversions, NansStayNansAndBecomeQuiet) {
  const std::uint64_t f32_nans[] = {0x7f800001, 0x7fbfffff, 0x7fc00000, 0x7fffffff,
                                    0xff800001, 0xffbfffff, 0xffc00000, 0xffffffff};
  const std::uint64_t f64_nans[] = {0x7ff0000000000001, 0x7ff7ffffffffffff, 0x7fffffffffffffff,
                                    0xfff0000000000001, 0xfff8000000000000, 0xffffffffffffffff,
                                    0x7ff0000020000000, 0x7ff8000000000001};
  for (const DType to : all_dtypes) {
    Conversion from_f32(DType::f32, to, 40), from_f64(DType::f64, to, 40);
    for (std::int64_t i = 0; i < 40; ++i) {
      from_f32.problem.x.set_bits(i, f32_nans[i % 8]);
      from_f64.problem.x.set_bits(i, f64_nans[i % 8]);
    }
    expect_conversion(from_f32, DType::f32, to);
    expect_conversion(from_f64, DType::f64, to);
  }
}

// All patterns through the kernels for equal dtypes, with a weight and without, on both roundings.
TEST(LibraryConversions, EveryPatternThroughTheFormula) {
  for (const DType t : halves) {
    for (const int weight : {0, 1, 2}) {
      for (const Rounding rounding : {Rounding::once, Rounding::before_weight}) {
        for (const bool with_residual : {false, true}) {
          Case c;
          c.sizes = {pattern_count / pattern_step() / 256, 256};
          c.x = c.y = tensor(t);
          c.residual = c.residual_out = TensorSpec{with_residual, t};
          c.weight = TensorSpec{weight != 0, weight == 1 ? t : DType::f32};
          c.mean_square = tensor(DType::f32);
          c.rounding = rounding;
          c.rstd = tensor(DType::f32);
          ForwardProblem problem(c);
          Random random(7);
          for (std::int64_t i = 0; i < problem.x.count(); ++i) {
            problem.x.set_bits(i, static_cast<std::uint64_t>(i * pattern_step()));
            if (with_residual) problem.residual.set_bits(i, random.bits() & 0xffff);
          }
          problem.keep();
          const Inputs in = problem.inputs();
          std::vector<double> rstd;
          for (const double m : in.mean_square) {
            rstd.push_back(static_cast<float>(rstd_of_mean_square(c, m)));
          }
          Results expected = emulate(c, in, rstd);
          for (const double r : rstd) expected.rstd.push_back(encode(DType::f32, r));
          for (const Isa isa : available_isas()) {
            expect_same(c, expected, problem.run(isa), name(isa));
          }
          if (HasFailure()) return;
        }
      }
      if (grid_is_small()) break;
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
