// Rows may be computed in any parts and any order: the bits are those of one call.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "case_grid.hpp"
#include "instruction_sets.hpp"

namespace rmsnorm_test {
namespace {

std::vector<Range> random_parts(std::int64_t rows, Random& random) {
  std::vector<std::int64_t> cuts = {0, rows};
  for (std::int64_t i = random.below(4); i >= 0; --i) cuts.push_back(random.below(rows + 1));
  std::sort(cuts.begin(), cuts.end());
  std::vector<Range> parts;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) parts.push_back({cuts[i], cuts[i + 1]});
  std::reverse(parts.begin(), parts.end());
  return parts;
}

TEST(RowRange, PartsGiveTheBitsOfTheWhole) {
  const std::vector<Isa> isas = available_isas();
  Random random(11);
  for (const Case& c : all_cases()) {
    if (c.rows() < 2) continue;
    const Isa isa = isas[static_cast<std::size_t>(random.below(std::int64_t(isas.size())))];
    ForwardProblem problem(c);
    const Results whole = problem.run(isa);
    expect_same(c, whole, problem.run(isa, random_parts(c.rows(), random)), "in parts");
    if (HasFailure()) break;
  }
}

// The write set is that of the rows asked for: ForwardProblem::run reports any other write.
TEST(RowRange, OtherRowsStayUntouched) {
  Random random(13);
  for (const Case& c : all_cases()) {
    const std::int64_t begin = random.below(c.rows() + 1);
    const std::int64_t end = begin + random.below(c.rows() - begin + 1);
    ForwardProblem(c).run(available_isas().back(), {{begin, end}});
    if (HasFailure()) break;
  }
}

TEST(RowRange, ARowDoesNotDependOnTheOthers) {
  for (const DType t : all_dtypes) {
    Case c;
    c.sizes = {9, 333};
    c.x = c.weight = c.y = tensor(t);
    c.rstd = tensor(c.rstd_type());
    for (const Isa isa : available_isas()) {
      ForwardProblem problem(c);
      const Results before = problem.run(isa);
      // The neighbours of row 4 overflow, underflow, or are no numbers at all.
      const double strange[] = {3e38, 1e-40, NAN, INFINITY};
      for (std::int64_t row = 0; row < 9; ++row) {
        if (row == 4) continue;
        for (std::int64_t i = 0; i < 333; ++i) problem.x.set(row * 333 + i, strange[row % 4]);
      }
      problem.keep();
      const Results after = problem.run(isa);
      EXPECT_EQ(before.rstd[4], after.rstd[4]) << name(isa) << ' ' << describe(c);
      EXPECT_TRUE(std::equal(before.y.begin() + 4 * 333, before.y.begin() + 5 * 333,
                             after.y.begin() + 4 * 333))
          << name(isa) << ' ' << describe(c);
    }
  }
}

TEST(RowRange, LayoutAndAlignmentDoNotChangeBits) {
  for (const DType t : all_dtypes) {
    for (const bool add : {false, true}) {
      Case c;
      c.sizes = {2, 3, 5, 61};
      c.axis = 2;
      c.x = c.weight = c.y = tensor(t);
      if (add) c.residual = c.residual_out = tensor(t);
      c.rstd = tensor(c.rstd_type());
      const Results expected = ForwardProblem(c, 2).run(Isa::scalar);
      Random random(17);
      for (int i = 0; i < (grid_is_small() ? 8 : 300); ++i) {
        Case other = c;
        for (TensorSpec* s : {&other.x, &other.weight, &other.y, &other.residual,
                              &other.residual_out, &other.rstd}) {
          s->layout = output_layouts[random.below(std::size(output_layouts))];
          s->offset = static_cast<int>(random.below(17));
        }
        for (const Isa isa : available_isas()) {
          expect_same(other, expected, ForwardProblem(other, 2).run(isa), name(isa));
        }
        if (HasFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
