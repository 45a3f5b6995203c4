// The bits of a row depend on the row, not on what lies around it, where it lies or how it is
// reached.
#include <gtest/gtest.h>

#include <cmath>

#include "case_grid.hpp"
#include "device_memory.hpp"

namespace rmsnorm_test {
namespace {

enum class Content { ordinary, tiny, huge, zeros, with_nan, with_infinity };

// Row number `row` of an endless supply: most are ordinary, some need scaling, or are beyond it.
Content content_of(std::int64_t row) {
  switch (row % 11) {
    case 1: return Content::tiny;
    case 4: return Content::huge;
    case 6: return row % 2 == 0 ? Content::zeros : Content::with_nan;
    case 9: return row % 2 == 0 ? Content::ordinary : Content::with_infinity;
    default: return Content::ordinary;
  }
}

void fill_row(GuardedTensor& t, std::int64_t place, std::int64_t n, std::int64_t row) {
  if (!t.present()) return;
  Random random(static_cast<std::uint64_t>(1000 + row));
  const Content content = content_of(row);
  const Format format = format_of(t.dtype());
  const int exponent = content == Content::tiny   ? format.min_exponent - format.precision / 2
                       : content == Content::huge ? format.max_exponent - 2
                                                  : 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const double v = std::ldexp(random.bell(), exponent);
    t.set(place * n + i, content == Content::zeros ? 0 : v);
  }
  if (content == Content::with_nan) t.set(place * n + n / 3, NAN);
  if (content == Content::with_infinity) t.set(place * n + n - 1, HUGE_VAL);
}

// The case's rows are `first`, first + 1 ... of the supply.
Results run_rows(const Case& c, std::int64_t first) {
  ForwardProblem problem(c);
  for (std::int64_t row = 0; row < c.rows(); ++row) {
    fill_row(problem.x, row, c.n(), first + row);
    fill_row(problem.residual, row, c.n(), first + row);
  }
  for (std::int64_t i = 0; i < problem.weight.count(); ++i) {
    problem.weight.set(i, 1 + static_cast<double>(i % 37) / 64);
  }
  problem.keep();
  return run_on_device(problem);
}

Case one_row(Case c) {
  c.sizes = {1, c.n()};
  c.axis = -1;
  for (TensorSpec* t : {&c.x, &c.residual, &c.weight, &c.y, &c.residual_out, &c.rstd}) {
    t->layout = Layout::contiguous;
    t->offset = t->shift = 0;
  }
  return c;
}

// Each row by itself, in the layout that needs nothing decided.
Results run_one_by_one(const Case& c, std::int64_t first, std::int64_t rows) {
  Results all;
  for (std::int64_t row = first; row < first + rows; ++row) {
    const Results one = run_rows(one_row(c), row);
    all.y.insert(all.y.end(), one.y.begin(), one.y.end());
    all.residual_out.insert(all.residual_out.end(), one.residual_out.begin(),
                            one.residual_out.end());
    all.rstd.insert(all.rstd.end(), one.rstd.begin(), one.rstd.end());
  }
  return all;
}

Case case_of(DType t, int variant, std::int64_t rows, std::int64_t n) {
  Case c;
  c.sizes = {rows, n};
  c.x = c.y = c.weight = tensor(t);
  c.rstd = tensor(c.rstd_type());
  c.eps = variant % 2 == 0 ? 0 : 1e-6;
  switch (variant % 5) {
    case 0: break;
    case 1: c.residual = c.residual_out = tensor(t); break;
    case 2:
      c.weight = tensor(t == DType::f64 ? t : DType::f32);
      c.rounding = Rounding::before_weight;
      break;
    case 3:
      c.residual = tensor(t);
      c.rounding = Rounding::rstd;
      c.weight_offset = 1;
      break;
    default: c.weight = TensorSpec{}; break;
  }
  return c;
}

// Rows that stay on 16-byte boundaries, and then every other layout there is.
void expect_same_in_every_layout(const Case& c, const Results& expected, std::int64_t first) {
  for (const Layout layout : output_layouts) {
    for (const int offset : {0, 1, 3}) {
      if (c.rows() * c.n() > 20000 && offset == 1) continue;
      Case other = c;
      for (TensorSpec* t : {&other.x, &other.residual, &other.y, &other.residual_out}) {
        t->layout = layout;
        t->offset = offset;
      }
      other.weight.offset = offset;
      other.rstd.layout = layout;
      if (offset == 3) other.x.shift = other.rstd.shift = 1;
      expect_same(other, expected, run_rows(other, first), "another layout");
    }
  }
}

TEST(RowBits, DoNotDependOnTheBatch) {
  int variant = 0;
  for (const DType t : all_dtypes) {
    for (const std::int64_t vectors : {1, 3, 8, 16, 40, 70, 200}) {
      for (int i = 0; i < (grid_is_small() ? 1 : 5); ++i) {
        ++variant;
        const std::int64_t n = vectors * (16 / rmsnorm::size_in_bytes(t));
        const Case one = case_of(t, variant, 64, n);
        const Results alone = run_one_by_one(one, 0, 64);
        expect_same(one, alone, run_rows(one, 0), "64 rows");
        Case five = one;
        five.sizes = {5, n};
        for (const std::int64_t first : {0, 1, 30}) {
          const Results expected = run_one_by_one(five, first, 5);
          expect_same(five, expected, run_rows(five, first), "5 rows");
        }
        if (HasFailure()) return;
      }
    }
  }
}

TEST(RowBits, DoNotDependOnTheLayout) {
  int variant = 0;
  for (const DType t : all_dtypes) {
    for (const std::int64_t vectors : {1, 5, 32, 64, 101, 300}) {
      for (int i = 0; i < (grid_is_small() ? 1 : 3); ++i) {
        const std::int64_t n = vectors * (16 / rmsnorm::size_in_bytes(t));
        const Case c = case_of(t, variant++, 6, n);
        expect_same_in_every_layout(c, run_one_by_one(c, 0, 6), 0);
        if (HasFailure()) return;
      }
    }
  }
}

// Clusters, rows in shared memory, and rows that are read again.
TEST(RowBits, OfLongRowsDoNotDependOnTheLayout) {
  if (grid_is_small()) return;
  int variant = 3;
  for (const DType t : all_dtypes) {
    for (const std::int64_t vectors : {2049, 5000, 11000, 17000}) {
      const std::int64_t n = vectors * (16 / rmsnorm::size_in_bytes(t));
      // The second row needs to be scaled.
      const Case c = case_of(t, variant++, 2, n);
      const Results expected = run_one_by_one(c, 0, 2);
      for (const Layout layout : {Layout::contiguous, Layout::reversed_rows,
                                  Layout::inner_stride_two, Layout::padded_rows}) {
        Case other = c;
        for (TensorSpec* s : {&other.x, &other.residual, &other.y, &other.residual_out}) {
          s->layout = layout;
        }
        if (layout == Layout::contiguous) other.y.offset = 1;
        expect_same(other, expected, run_rows(other, 0), "another layout");
      }
      if (HasFailure()) return;
    }
  }
}

// Heads of a packed projection, also with an outer dimension that does not divide by a power of
// two.
TEST(RowBits, OfHeadsAreThoseOfTheirRows) {
  for (const DType t : all_dtypes) {
    for (const std::vector<std::int64_t>& sizes :
         {std::vector<std::int64_t>{3, 7, 64}, {2, 3, 5, 32}, {5, 1, 6, 128}, {1, 9, 2, 3, 16}}) {
      for (const Layout layout : output_layouts) {
        Case c = case_of(t, 1, 1, sizes.back());
        c.sizes = sizes;
        c.x.layout = c.y.layout = c.rstd.layout = layout;
        c.residual.layout = Layout::packed_slice;
        expect_same(c, run_one_by_one(c, 0, c.rows()), run_rows(c, 0), "heads");
        if (HasFailure()) return;
      }
    }
  }
}

// What the packed kernel never has: here both go the other way, so that only values can differ.
TEST(RowBits, OfAnAbsentBiasAreThoseOfZeros) {
  for (const DType t : all_dtypes) {
    for (const std::int64_t n : {64, 1000, 6000}) {
      for (const Rounding rounding : {Rounding::once, Rounding::before_weight, Rounding::rstd}) {
        Case c = case_of(t, 0, 3, n);
        c.rounding = rounding;
        Case with_bias = c;
        with_bias.bias = tensor(t);
        ForwardProblem plain(c), biased(with_bias);
        for (std::int64_t i = 0; i < n; ++i) biased.bias.set(i, -0.0);
        biased.keep();
        expect_same(c, run_on_device(plain), run_on_device(biased), "a bias of zeros");
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
