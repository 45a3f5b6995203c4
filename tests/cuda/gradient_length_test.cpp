// Gradients of rows of every length at which the way to share a row among threads changes, and of
// every number of rows at which blocks of rows do: against exact arithmetic, and bit by bit in the
// documented order.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "case_grid.hpp"
#include "device_memory.hpp"
#include "rmsnorm/cuda/shape.hpp"

namespace rmsnorm_test {
namespace {

using rmsnorm::cuda::detail::gradient_rows_per_block;
using rmsnorm::cuda::detail::gradient_shape;
using rmsnorm::cuda::detail::RowShape;

std::int64_t vectors_of(const GradientCase& c) {
  const std::int64_t width =
      c.computes_in_double() ? 2 : 16 / rmsnorm::size_in_bytes(c.forward.x.dtype);
  return (c.forward.n() + width - 1) / width;
}

// Everything from the given rstd on, in the roundings and the order of docs/numerics.md. Of rows
// side by side, with weight and bias for all of them.
template <class C>
class Emulation {
 public:
  Emulation(const GradientCase& c, const GradientInputs& in)
      : c_(c), in_(in), n_(c.forward.n()), rows_(c.forward.rows()), xhat_(at(rows_, 0)), g_(xhat_) {
    for (std::int64_t row = 0; row < rows_; ++row) {
      for (std::int64_t i = 0; i < n_; ++i) {
        xhat_[at(row, i)] = static_cast<C>(in.x[at(row, i)]) * static_cast<C>(in.rstd[at_row(row)]);
        const C w = in.weight.empty() ? C(1)
                                      : static_cast<C>(c.forward.weight_offset) +
                                            static_cast<C>(in.weight[static_cast<std::size_t>(i)]);
        g_[at(row, i)] = static_cast<C>(in.dy[at(row, i)]) * w;
      }
    }
  }

  // Some c within its bound, the same for the whole row, must give every bit of dx.
  void expect_dx(const GradientResults& got) const {
    for (std::int64_t row = 0; row < rows_; ++row) {
      long double sum = 0, magnitude = 0;
      for (std::int64_t i = 0; i < n_; ++i) {
        const long double product =
            static_cast<long double>(g_[at(row, i)]) * static_cast<long double>(xhat_[at(row, i)]);
        sum += product;
        magnitude += std::fabs(product);
      }
      const C exact = static_cast<C>(sum / static_cast<long double>(n_));
      const auto bound = static_cast<C>(magnitude / static_cast<long double>(n_) * c_bound());
      // The candidates nearest to the exact one first.
      bool found = false;
      C below = exact, above = exact;
      for (int k = 0; k < 200 && !found; ++k) {
        if (k > 1 && exact - below > bound && above - exact > bound) break;
        found = gives_dx(row, below, got) || gives_dx(row, above, got);
        below = std::nextafter(below, -std::numeric_limits<C>::infinity());
        above = std::nextafter(above, std::numeric_limits<C>::infinity());
      }
      EXPECT_TRUE(found) << "row " << row << ", c about " << exact << "; " << describe(c_);
      if (!found) return;
    }
  }

  std::vector<std::uint64_t> dweight() const {
    return sums(c_.dweight.dtype, [&](std::int64_t row, std::int64_t i, C sum) {
      return std::fma(static_cast<C>(in_.dy[at(row, i)]), xhat_[at(row, i)], sum);
    });
  }
  std::vector<std::uint64_t> dbias() const {
    return sums(c_.dbias.dtype, [&](std::int64_t row, std::int64_t i, C sum) {
      return sum + static_cast<C>(in_.dy[at(row, i)]);
    });
  }

 private:
  std::size_t at(std::int64_t row, std::int64_t i) const {
    return static_cast<std::size_t>(row * n_ + i);
  }
  static std::size_t at_row(std::int64_t row) { return static_cast<std::size_t>(row); }

  // Compensated sums leave c's own rounding, and nothing that another candidate would be for but
  // ties; plain ones 23 roundings (docs/numerics.md).
  long double c_bound() const {
    const bool plain = sizeof(C) == 4 && rmsnorm::size_in_bytes(c_.forward.x.dtype) == 2 &&
                       rmsnorm::size_in_bytes(c_.dy.dtype) == 2 &&
                       rmsnorm::size_in_bytes(c_.dx.dtype) == 2 &&
                       gradient_shape(vectors_of(c_), device_version()).vectors != 0;
    return plain ? 23 * 0x1p-24L : 0;
  }

  bool gives_dx(std::int64_t row, C c, const GradientResults& got) const {
    const C rstd = static_cast<C>(in_.rstd[at_row(row)]);
    for (std::int64_t i = 0; i < n_; ++i) {
      const C t = std::fma(-c, xhat_[at(row, i)], g_[at(row, i)]);
      const C dx = in_.d_residual.empty()
                       ? t * rstd
                       : std::fma(t, rstd, static_cast<C>(in_.d_residual[at(row, i)]));
      if (encode(c_.dx.dtype, round_to(c_.dx.dtype, static_cast<double>(dx))) !=
          got.dx[at(row, i)]) {
        return false;
      }
    }
    return true;
  }

  template <class Add>
  std::vector<std::uint64_t> sums(DType t, Add add) const {
    const std::int64_t rows_per_block = gradient_rows_per_block(rows_, vectors_of(c_));
    const std::int64_t blocks = (rows_ + rows_per_block - 1) / rows_per_block;
    std::int64_t threads = 1;
    while (threads < 16 && threads < blocks) threads *= 2;
    std::vector<std::uint64_t> bits;
    for (std::int64_t i = 0; i < n_; ++i) {
      std::vector<double> of_threads(static_cast<std::size_t>(threads));
      for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t begin = b * rows_per_block;
        of_threads[static_cast<std::size_t>(b % threads)] += static_cast<double>(
            sum_of_block(begin, std::min(rows_, begin + rows_per_block), i, add));
      }
      double sum = of_threads[0];
      for (std::int64_t k = 1; k < threads; ++k) sum += of_threads[static_cast<std::size_t>(k)];
      bits.push_back(encode(t, round_to(t, sum)));
    }
    return bits;
  }

  template <class Add>
  C sum_of_block(std::int64_t begin, std::int64_t end, std::int64_t i, Add add) const {
    const int teams = gradient_shape(vectors_of(c_), device_version()).rows_per_block;
    std::vector<C> of_teams(static_cast<std::size_t>(teams));
    for (std::int64_t row = begin; row < end; ++row) {
      C& sum = of_teams[static_cast<std::size_t>((row - begin) % teams)];
      sum = add(row, i, sum);
    }
    for (std::size_t half = of_teams.size() / 2; half > 0; half /= 2) {
      for (std::size_t k = 0; k < half; ++k) of_teams[k] += of_teams[k + half];
    }
    return of_teams[0];
  }

  const GradientCase& c_;
  const GradientInputs& in_;
  std::int64_t n_, rows_;
  std::vector<C> xhat_, g_;
};

template <class C>
void expect_order(const GradientCase& c, const GradientInputs& in, const GradientResults& got) {
  const Emulation<C> emulation(c, in);
  emulation.expect_dx(got);
  GradientResults expected = got;
  if (c.dweight.present) expected.dweight = emulation.dweight();
  if (c.dbias.present) expected.dbias = emulation.dbias();
  expect_same(c, expected, got, "order of sums");
}

void expect_contract(const GradientCase& c, std::uint64_t seed) {
  BackwardProblem problem(c, rmsnorm::cuda::backward_workspace, seed);
  const GradientInputs in = problem.inputs();
  const GradientResults got = run_on_device(problem);
  expect_gradients(c, in, got, "cuda");
  if (c.computes_in_double()) {
    expect_order<double>(c, in, got);
  } else {
    expect_order<float>(c, in, got);
  }
}

// With rstd given, which the emulation starts from.
GradientCase case_of(DType t, std::int64_t rows, std::int64_t n) {
  GradientCase c;
  c.forward.sizes = {rows, n};
  c.dy = c.forward.x = c.forward.weight = c.dx = c.dweight = tensor(t);
  c.forward.rstd = tensor(c.compute_type());
  return c;
}

// In 16-byte vectors of x. 2040 and 5200 are the most of dy and x that shared memory holds on
// compute capability 7.5 and 8.0.
std::vector<std::int64_t> border_lengths() {
  std::vector<std::int64_t> borders = {1, 2, 4, 8, 16, 32, 64, 128, 192, 256};
  if (!grid_is_small()) {
    for (const std::int64_t v : {512, 1024, 2040, 2048, 4096, 5200, 8192}) borders.push_back(v);
  }
  return borders;
}

TEST(GradientLength, EveryShapeHoldsTheContract) {
  int turn = 0;
  for (const std::int64_t border : border_lengths()) {
    for (const std::int64_t vectors : {border - 1, border, border + 1}) {
      for (const DType t : all_dtypes) {
        // A whole number of vectors, and a part of one more.
        for (const std::int64_t beyond : {0, 1}) {
          ++turn;
          if (border > 1000 && (turn + border) % 3 != 0) continue;
          const std::int64_t width = 16 / rmsnorm::size_in_bytes(t);
          const std::int64_t n = vectors * width + beyond;
          if (n == 0) continue;
          GradientCase c = case_of(t, border > 1000 ? 2 : 3 + turn * 5 % 17, n);
          if (turn % 2 == 0) c.d_residual = tensor(t);
          if (turn % 3 == 0) c.forward.weight_offset = 1;
          if (turn % 4 == 0 && beyond == 1) c.dbias = tensor(t);
          if (turn % 5 == 0 && t != DType::f64) c.forward.weight = c.dweight = tensor(DType::f32);
          expect_contract(c, static_cast<std::uint64_t>(turn));
          if (HasFailure()) return;
        }
      }
    }
  }
}

// Blocks of several rows, the last of which is not full; with a bias, in memory instead of
// registers.
TEST(GradientLength, AnyNumberOfRowsFillsBlocks) {
  for (const std::int64_t vectors : {1, 2, 3, 5, 13, 27, 33, 100}) {
    for (const std::int64_t rows :
         {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 63, 65, 127, 129, 257}) {
      if (rows * vectors > (grid_is_small() ? 300 : 2000)) continue;
      for (const bool with_bias : {false, true}) {
        GradientCase c = case_of(DType::bf16, rows, 8 * vectors);
        if (with_bias) c.dbias = tensor(DType::f32);
        expect_contract(c, 1);
        if (HasFailure()) return;
      }
    }
  }
}

// Many blocks, and blocks of more rows than the least.
TEST(GradientLength, ManyRows) {
  if (grid_is_small()) return;
  expect_contract(case_of(DType::f64, 3000, 130), 1);  // a row a team: blocks of 12 rows
  expect_contract(case_of(DType::bf16, 9000, 64), 2);  // 32 teams
  GradientCase c = case_of(DType::f32, 2500, 64);      // 16 teams
  c.dbias = tensor(DType::bf16);
  expect_contract(c, 3);
}

// Rows that nothing holds; on compute capability 9.0 only these.
TEST(GradientLength, OfTheLongestRows) {
  if (grid_is_small()) return;
  GradientCase c = case_of(DType::f64, 2, 2 * 60000);
  c.d_residual = tensor(DType::f64);
  expect_contract(c, 1);
  expect_contract(case_of(DType::bf16, 1, 1 << 20), 2);
}

TEST(GradientLength, BlocksOfRowsAreAFunctionOfSizes) {
  const auto blocks = [](std::int64_t rows, std::int64_t vectors) {
    const std::int64_t each = gradient_rows_per_block(rows, vectors);
    return (rows + each - 1) / each;
  };
  // hidden size 4096 in bf16
  EXPECT_EQ(gradient_rows_per_block(1, 512), 4);
  EXPECT_EQ(gradient_rows_per_block(1056, 512), 4);
  EXPECT_EQ(blocks(1056, 512), 264);
  EXPECT_EQ(gradient_rows_per_block(1057, 512), 5);
  EXPECT_EQ(blocks(8448, 512), 264);
  EXPECT_EQ(gradient_rows_per_block(16384, 512), 32);
  EXPECT_EQ(blocks(16384, 512), 512);
  EXPECT_EQ(blocks(128 * 528, 512), 528);
  EXPECT_EQ(gradient_rows_per_block(std::int64_t{1} << 20, 512), 128);
  // Heads of 128 in bf16: 16 teams a block.
  EXPECT_EQ(gradient_rows_per_block(7, 16), 64);
  EXPECT_EQ(gradient_rows_per_block(1 << 20, 16) % 16, 0);
  EXPECT_LE(blocks(1 << 20, 16), 528);
  // Rows that several blocks of threads share.
  EXPECT_EQ(blocks(128 * 264, 2048), 264);
  for (const std::int64_t vectors : {0, 1, 7, 32, 64, 65, 1024, 1025, 1 << 17}) {
    for (const int rows : {1, 5, 100, 5000, 1 << 20}) {
      EXPECT_GE(gradient_rows_per_block(rows, vectors), 4);
      EXPECT_LE(blocks(rows, vectors), std::max(528, rows / 128));
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
