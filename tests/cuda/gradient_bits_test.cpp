// The bits of dx depend on the row, those of dweight on the rows and their number: not on where
// they lie or how they are reached.
#include <gtest/gtest.h>

#include <cmath>

#include "case_grid.hpp"
#include "device_memory.hpp"

namespace rmsnorm_test {
namespace {

// Row number `row` of an endless supply: some need scaling, or are beyond it.
void fill_row(BackwardProblem& problem, std::int64_t place, std::int64_t n, std::int64_t row) {
  Random random(static_cast<std::uint64_t>(1000 + row));
  const Format format = format_of(problem.x.dtype());
  const int exponent = row % 11 == 1   ? format.min_exponent - format.precision / 2
                       : row % 11 == 4 ? format.max_exponent - 2
                                       : 0;
  for (std::int64_t i = place * n; i < (place + 1) * n; ++i) {
    problem.x.set(i, row % 11 == 6 ? 0 : std::ldexp(random.bell(), exponent));
    problem.dy.set(i, random.bell() / 8);
    if (problem.d_residual.present()) problem.d_residual.set(i, random.symmetric());
  }
  if (row % 22 == 9) problem.x.set(place * n + n / 3, NAN);
  if (row % 22 == 20) problem.x.set(place * n + n - 1, HUGE_VAL);
  if (!problem.rstd.present()) return;
  // One in eight is of no use.
  problem.rstd.set(place, row % 8 == 2 ? HUGE_VAL : std::ldexp(1.25, -exponent));
}

// The case's rows are `first`, first + 1 ... of the supply.
GradientResults run_rows(const GradientCase& c, std::int64_t first) {
  BackwardProblem problem(c, rmsnorm::cuda::backward_workspace);
  for (std::int64_t row = 0; row < c.forward.rows(); ++row) {
    fill_row(problem, row, c.forward.n(), first + row);
  }
  for (std::int64_t i = 0; i < problem.weight.count(); ++i) {
    problem.weight.set(i, 1 + static_cast<double>(i % 37) / 64);
  }
  problem.keep();
  return run_on_device(problem);
}

GradientCase case_of(DType t, int variant, std::int64_t rows, std::int64_t n) {
  GradientCase c;
  c.forward.sizes = {rows, n};
  c.dy = c.forward.x = c.dx = c.dweight = c.forward.weight = tensor(t);
  c.forward.eps = variant % 2 == 0 ? 0 : 1e-6;
  if (variant % 2 == 0) c.d_residual = tensor(t);
  if (variant % 3 == 0) c.forward.rstd = tensor(c.compute_type());
  if (variant % 3 == 1 && t != DType::f64) c.forward.weight.dtype = DType::f32;
  if (variant % 4 == 3) c.forward.weight_offset = 1;
  return c;
}

TEST(GradientBits, OfARowDoNotDependOnTheBatch) {
  int variant = 0;
  for (const DType t : all_dtypes) {
    for (const std::int64_t vectors : {1, 3, 16, 40, 70, 300, 1100}) {
      for (const std::int64_t rows : {9, 45}) {
        if (grid_is_small() && (rows != 9 || vectors > 200)) continue;
        if (rows * vectors > 10000) continue;
        const std::int64_t n = vectors * (16 / rmsnorm::size_in_bytes(t));
        const GradientCase all = case_of(t, ++variant, rows, n);
        GradientCase one = all;
        one.forward.sizes = {1, n};
        one.dweight = {};
        GradientResults expected = run_rows(all, 0);
        const std::vector<std::uint64_t> dx = expected.dx;
        expected.dx.clear();
        for (std::int64_t row = 0; row < rows; ++row) {
          const GradientResults alone = run_rows(one, row);
          expected.dx.insert(expected.dx.end(), alone.dx.begin(), alone.dx.end());
        }
        GradientResults got = expected;
        got.dx = dx;
        expect_same(all, expected, got, "the batch");
        if (HasFailure()) return;
      }
    }
  }
}

// Rows that stay on 16-byte boundaries, and then every other layout there is.
TEST(GradientBits, DoNotDependOnTheLayout) {
  int variant = 0;
  for (const DType t : all_dtypes) {
    for (const std::int64_t vectors : {1, 5, 32, 64, 101, 1030, 9000}) {
      if (vectors > 1000 && (grid_is_small() || (vectors + variant) % 2 == 0)) {
        ++variant;
        continue;
      }
      const std::int64_t n = vectors * (16 / rmsnorm::size_in_bytes(t));
      const GradientCase c = case_of(t, variant++, vectors > 1000 ? 5 : vectors > 50 ? 13 : 37, n);
      const GradientResults expected = run_rows(c, 0);
      int turn = 0;
      for (const Layout layout : output_layouts) {
        for (const int offset : {0, 1, 3}) {
          if (vectors > 64 && ++turn % 5 != 1) continue;
          GradientCase other = c;
          for (TensorSpec* s : {&other.dy, &other.forward.x, &other.d_residual, &other.dx}) {
            s->layout = layout;
            s->offset = offset;
          }
          other.forward.weight.offset = other.dweight.offset = offset;
          other.forward.rstd.layout = layout;
          if (offset == 3) other.dy.shift = other.forward.rstd.shift = other.dweight.shift = 1;
          if (offset == 0) other.dweight.layout = layout;
          expect_same(other, expected, run_rows(other, 0), "another layout");
          if (HasFailure()) return;
        }
      }
    }
  }
}

// A bias, which packed kernels never have, changes nothing of the rest; nor do the other options
// that they do not have where these do nothing.
TEST(GradientBits, DoNotDependOnABias) {
  for (const DType t : all_dtypes) {
    for (const std::int64_t n : {64, 1000, 6000}) {
      const GradientCase c = case_of(t, 0, 20, n);
      GradientCase with_bias = c;
      with_bias.dbias = tensor(t);
      GradientResults got = run_rows(with_bias, 0);
      got.dbias.clear();
      expect_same(c, run_rows(c, 0), got, "with a bias");
      GradientCase without = c;
      without.dweight = {};
      GradientResults expected = got;
      expected.dweight.clear();
      expect_same(without, expected, run_rows(without, 0), "without dweight");
    }
  }
}

// Weights that differ from row to row.
TEST(GradientBits, OfWeightsOfTheirOwn) {
  for (const DType t : {DType::bf16, DType::f32}) {
    for (const std::int64_t n : {16, 256, 3000}) {
      for (const bool with_dweight : {false, true}) {
        GradientCase c = case_of(t, 1, 1, n);
        c.forward.sizes = {4, 5, n};
        c.forward.broadcast = Broadcast::per_head;
        if (!with_dweight) c.dweight = {};
        const GradientResults expected = run_rows(c, 0);
        c.dy.offset = 1;
        expect_same(c, expected, run_rows(c, 0), "weights per head");
      }
    }
  }
}

// What a row still needs must not have been overwritten: rows in registers, in clusters, in shared
// memory and read again, by both ways to reach elements.
TEST(GradientBits, OfLongRowsOverAnInputAreThoseInMemoryOfTheirOwn) {
  for (const DType t : {DType::bf16, DType::f32}) {
    for (const std::int64_t vectors : {200, 1030, 5300}) {
      if (grid_is_small() && vectors > 1000) continue;
      GradientCase c = case_of(t, 4, 5, vectors * (16 / rmsnorm::size_in_bytes(t)));
      if (vectors == 200) c.forward.rstd = {};
      for (const bool packed : {true, false}) {
        if (!packed) c.forward.residual = tensor(t);
        const GradientResults expected = run_rows(c, 0);
        for (const GradientAlias alias : {GradientAlias::dy, GradientAlias::x,
                                          GradientAlias::residual, GradientAlias::d_residual}) {
          if (packed && alias == GradientAlias::residual) continue;
          GradientCase over = c;
          over.dx_over = alias;
          expect_same(over, expected, run_rows(over, 0), "dx over an input");
        }
        if (HasFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
