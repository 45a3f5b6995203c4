// Rows whose statistics are taken from scaled elements, on every instruction set: what the scale
// must not cost.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "float_formats.hpp"
#include "instruction_sets.hpp"
#include "rmsnorm/bounds.hpp"
#include "rmsnorm/rmsnorm.hpp"

namespace rmsnorm_test {
namespace {

using rmsnorm::cpu::Isa;

double exact_rstd(const std::vector<float>& x) {
  long double sum = 0;
  for (const float v : x) sum += static_cast<long double>(v) * v;
  return static_cast<double>(1 / std::sqrt(sum / static_cast<long double>(x.size())));
}

// One element of 2^74 among 2^20: a row's root mean square is 2^-10 of its largest element, and
// scaling brings elements of 2^-60 to denormals although their results are normal numbers.
TEST(RowScale, KeepsTheBitsOfElementsFarBelowTheLargest) {
  const std::int64_t n = 1 << 20;
  std::vector<float> x(static_cast<std::size_t>(n), 0x1.876544p-60f), y(x.size());
  x[0] = 0x1p74f;
  rmsnorm::ForwardParams p;
  p.x = rmsnorm::matrix<const float>(x.data(), 1, n);
  p.y = rmsnorm::matrix(y.data(), 1, n);
  p.eps = 0;
  const double exact = static_cast<double>(x[1]) * exact_rstd(x);
  ASSERT_GT(exact, 0x1p-126);
  const double bound = rmsnorm::error_bound(DType::f32, DType::f32);
  for (const Isa isa : available_isas()) {
    ASSERT_TRUE(rmsnorm::cpu::forward(p, 0, 1, isa).ok());
    EXPECT_LE(ulp_error(DType::f32, exact, y[1]), bound) << name(isa);
  }
}

// dx is g * 2^-118, a quarter of the smallest normal number, from a g of 2^-9.
TEST(RowScale, KeepsTheBitsOfSmallGradients) {
  const std::int64_t n = 1 << 20;
  std::vector<float> x(static_cast<std::size_t>(n), 0x1p100f), dy(x.size(), 0x1.23456p-9f);
  std::vector<float> dx(x.size());
  x[0] = 0x1.8p127f;
  dy[0] = 0;
  rmsnorm::BackwardParams p;
  p.x = rmsnorm::matrix<const float>(x.data(), 1, n);
  p.dy = rmsnorm::matrix<const float>(dy.data(), 1, n);
  p.dx = rmsnorm::matrix(dx.data(), 1, n);
  p.eps = 0;
  const double rstd = exact_rstd(x), xhat = x[1] * rstd;
  const double c = static_cast<double>(n - 1) / static_cast<double>(n) * dy[1] * xhat;
  const double exact = (dy[1] - c * xhat) * rstd;
  for (const Isa isa : available_isas()) {
    ASSERT_TRUE(rmsnorm::cpu::backward(p, 0, 1, isa).ok());
    EXPECT_NEAR(dx[1], exact, 4 * std::ldexp(dy[1] * rstd, -24) + 0x1p-150) << name(isa);
  }
}

// x rstd and g rstd are 0.98 and 0.97 of the largest float, and their product with dy or x is
// small.
TEST(RowScale, GradientsBelowTheLargestNumberDoNotOverflow) {
  const float x[1] = {-0.03335f}, dy[1] = {0.033f}, weight[1] = {1};
  const double mean_square = 1e-80;
  float dx[1], dweight[1];
  double d_mean_square = 0;
  rmsnorm::BackwardParams p;
  p.x = rmsnorm::matrix(x, 1, 1);
  p.dy = rmsnorm::matrix(dy, 1, 1);
  p.weight = rmsnorm::vector(weight, 1);
  p.mean_square = rmsnorm::vector(&mean_square, 1);
  p.dx = rmsnorm::matrix(dx, 1, 1);
  p.dweight = rmsnorm::vector(dweight, 1);
  p.d_mean_square = rmsnorm::vector(&d_mean_square, 1);
  p.eps = 0;
  alignas(64) unsigned char workspace[4096];
  p.workspace = workspace;
  p.workspace_bytes = sizeof(workspace);
  ASSERT_LE(rmsnorm::cpu::backward_workspace(p), p.workspace_bytes);
  for (const Isa isa : available_isas()) {
    dx[0] = dweight[0] = 0;
    ASSERT_TRUE(rmsnorm::cpu::backward(p, 0, 1, isa).ok());
    ASSERT_TRUE(rmsnorm::cpu::backward_reduce(p, 0, 1, isa).ok());
    EXPECT_NEAR(dweight[0] / (dy[0] * x[0] * 1e40), 1, 0x1p-22) << name(isa);
    EXPECT_NEAR(dx[0] / (dy[0] * 1e40), 1, 0x1p-22) << name(isa);
    EXPECT_NEAR(d_mean_square / (-0.5 * x[0] * dy[0] * 1e120), 1, 0x1p-22) << name(isa);
  }
}

// 1 / sqrt(eps) is beyond floats, and zero times infinity is no zero.
TEST(RowScale, RowsOfZerosAreZeroUnderAnyPositiveEpsilon) {
  for (const double eps : {1e-300, 1e-80, 1e-40, 1e-6, 1e100}) {
    for (const Isa isa : available_isas()) {
      const float x[3] = {0, -0.0f, 0}, dy[3] = {1, 0, 0x1p-140f};
      float y[3] = {7, 7, 7}, dx[3] = {};
      rmsnorm::ForwardParams p;
      p.x = rmsnorm::matrix(x, 1, 3);
      p.y = rmsnorm::matrix(y, 1, 3);
      p.eps = eps;
      ASSERT_TRUE(rmsnorm::cpu::forward(p, 0, 1, isa).ok());
      for (const float v : y) EXPECT_EQ(v, 0) << eps << ' ' << name(isa);
      rmsnorm::BackwardParams b;
      b.x = p.x;
      b.dy = rmsnorm::matrix(dy, 1, 3);
      b.dx = rmsnorm::matrix(dx, 1, 3);
      b.eps = eps;
      ASSERT_TRUE(rmsnorm::cpu::backward(b, 0, 1, isa).ok());
      for (int i = 0; i < 3; ++i) {
        const double exact = dy[i] / std::sqrt(eps);
        const double bound = std::fmax(std::fabs(exact) * 0x1p-22, 0x1p-148);
        EXPECT_TRUE(exact > 0x1p128 ? dx[i] == HUGE_VALF : std::fabs(dx[i] - exact) <= bound)
            << dx[i] << ", expected " << exact << ' ' << eps << ' ' << name(isa);
      }
    }
  }
}

// rstd^2 is beyond doubles where its product with the sum is not.
TEST(RowScale, TheGradientOfATinyMeanSquareDoesNotOverflow) {
  const double x = 1e-200, dy = 1e-200, mean_square = 0x1p-1060;
  double dx = 0, d_mean_square = 0;
  rmsnorm::BackwardParams p;
  p.x = rmsnorm::matrix(&x, 1, 1);
  p.dy = rmsnorm::matrix(&dy, 1, 1);
  p.mean_square = rmsnorm::vector(&mean_square, 1);
  p.dx = rmsnorm::matrix(&dx, 1, 1);
  p.d_mean_square = rmsnorm::vector(&d_mean_square, 1);
  p.eps = 0;
  const double expected = -0.5 * (x * 0x1p530) * (dy * 0x1p530) * 0x1p530;
  for (const Isa isa : available_isas()) {
    ASSERT_TRUE(rmsnorm::cpu::backward(p, 0, 1, isa).ok());
    EXPECT_NEAR(d_mean_square / expected, 1, 1e-15) << name(isa);
  }
}

}  // namespace
}  // namespace rmsnorm_test
