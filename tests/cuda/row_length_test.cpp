// Rows of every length at which the way to share a row among threads changes, on any architecture.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "case_grid.hpp"
#include "device_memory.hpp"
#include "formula.hpp"

namespace rmsnorm_test {
namespace {

// Every rounding from rstd on, bit by bit; and the distances from exact arithmetic.
void expect_contract(const Case& c, ForwardProblem& problem) {
  const Inputs in = problem.inputs();
  const Results got = run_on_device(problem);
  std::vector<double> rstd;
  for (const std::uint64_t bits : got.rstd) rstd.push_back(decode(c.rstd.dtype, bits));
  Results expected = emulate(c, in, rstd);
  expected.rstd = got.rstd;
  expect_same(c, expected, got, "cuda");
  const Errors errors = errors_of(c, in, got);
  EXPECT_LE(errors.y, y_budget(c)) << describe(c);
  EXPECT_LE(errors.rstd, rstd_budget(c)) << describe(c);
}

// In 16-byte vectors. The last but one are the most that shared memory holds on compute capability
// 7.5 and 8.0.
std::vector<std::int64_t> border_lengths() {
  std::vector<std::int64_t> borders = {1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512};
  if (!grid_is_small()) {
    for (const std::int64_t v : {1024, 2048, 4096, 8192, 16384, 3584, 10240}) borders.push_back(v);
  }
  return borders;
}

constexpr std::int64_t longest_in_a_warp = 128;

TEST(RowLength, EveryShapeHoldsTheContract) {
  int turn = 0;
  for (const std::int64_t border : border_lengths()) {
    for (const std::int64_t vectors : {border - 1, border, border + 1}) {
      for (const DType t : all_dtypes) {
        // A whole number of vectors, and a part of one more.
        for (const std::int64_t beyond : {0, 1}) {
          for (const bool with_residual : {false, true}) {
            ++turn;
            Case c;
            c.x = c.y = c.weight = tensor(t);
            const std::int64_t n = vectors * vector_width(c) + beyond;
            if (n == 0) continue;
            const bool is_short = vectors <= longest_in_a_warp;
            if (!is_short && !with_residual && beyond == 1) continue;
            if (vectors > 3000 && (turn + border) % 3 != 0) continue;
            c.sizes = {is_short ? 1 + turn * 5 % 17 : 1 + turn % 2, n};
            c.rstd = tensor(c.rstd_type());
            if (with_residual) c.residual = c.residual_out = tensor(t);
            if (turn % 5 == 0) c.rounding = Rounding::once;
            ForwardProblem problem(c, static_cast<std::uint64_t>(turn));
            expect_contract(c, problem);
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

// Blocks of several rows, the last of which is not full.
TEST(RowLength, AnyNumberOfRowsFillsBlocks) {
  for (const std::int64_t vectors : {1, 2, 3, 5, 13, 27, 33, 100, 200}) {
    for (const std::int64_t rows :
         {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 63, 65, 127, 128, 129}) {
      if (rows * vectors > (grid_is_small() ? 500 : 3300)) continue;
      for (const bool packed : {true, false}) {
        Case c;
        c.x = c.y = tensor(DType::bf16);
        c.weight = tensor(packed ? DType::f32 : DType::f16);
        c.rstd = tensor(DType::f32);
        c.sizes = {rows, 8 * vectors};
        ForwardProblem problem(c);
        expect_contract(c, problem);
        if (HasFailure()) return;
      }
    }
  }
}

// More blocks than the second and third dimension of a grid can have.
TEST(RowLength, ManyRows) {
  Case c;
  c.x = c.y = tensor(DType::f32);
  c.rstd = tensor(DType::f32);
  c.sizes = {grid_is_small() ? 2000 : 70000, 1};
  ForwardProblem problem(c);
  expect_contract(c, problem);
  c.x = c.y = c.residual = tensor(DType::f64);
  c.rstd = tensor(DType::f64);
  c.sizes = {grid_is_small() ? 2000 : 70000, 2};
  ForwardProblem packed(c);
  expect_contract(c, packed);
}

// A million elements: the roundings of constant rows all go one way.
TEST(RowLength, OfAMillionElements) {
  const std::int64_t n = grid_is_small() ? 40000 : std::int64_t{1} << 20;
  for (const DType t : all_dtypes) {
    for (const bool constant : {true, false}) {
      if (constant && rmsnorm::size_in_bytes(t) == 2) continue;
      Case c;
      c.sizes = {1, n};
      c.x = c.y = tensor(t);
      c.rstd = tensor(c.rstd_type());
      c.eps = 0;
      ForwardProblem problem(c);
      if (constant) {
        for (std::int64_t i = 0; i < n; ++i) problem.x.set(i, 1.1 * std::sqrt(1.5));
        problem.keep();
      }
      expect_contract(c, problem);
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
