// The floating-point mode of the calling thread neither changes a bit nor is changed.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "backward_problem.hpp"
#include "case_grid.hpp"
#include "instruction_sets.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rmsnorm_test {
namespace {

#if defined(__x86_64__)
using Mode = unsigned;
constexpr Mode exception_flags = 0x3f;
Mode mode() { return _mm_getcsr(); }
void set_mode(Mode m) { _mm_setcsr(m); }
// Flush-to-zero, denormals-are-zero, both; the three other roundings; all at once.
constexpr Mode strange_modes[] = {0x9f80, 0x1fc0, 0x9fc0, 0x3f80, 0x5f80, 0x7f80, 0xffc0};
#elif defined(__aarch64__)
using Mode = std::uint64_t;
constexpr Mode exception_flags = 0;
Mode mode() {
  Mode m;
  __asm__ volatile("mrs %0, fpcr" : "=r"(m));
  return m;
}
void set_mode(Mode m) { __asm__ volatile("msr fpcr, %0" : : "r"(m)); }
// Flush-to-zero, default NaN, the three other roundings, flush of f16, all at once.
constexpr Mode strange_modes[] = {Mode{1} << 24, Mode{1} << 25, Mode{1} << 22,    Mode{2} << 22,
                                  Mode{3} << 22, Mode{1} << 19, Mode{0x3c8} << 16};
#endif

#if defined(__x86_64__) || defined(__aarch64__)

std::vector<Case> cases() {
  std::vector<Case> chosen;
  for (const DType t : all_dtypes) {
    for (const DType weight : {t, DType::f32}) {
      for (const Rounding rounding : {Rounding::once, Rounding::before_weight, Rounding::rstd}) {
        Case c;
        c.sizes = {3, 300};
        c.x = c.y = tensor(t);
        c.weight = tensor(weight);
        c.rounding = rounding;
        c.rstd = tensor(c.rstd_type());
        chosen.push_back(c);
        c.residual = c.residual_out = tensor(t);
        c.residual_out.layout = Layout::reversed;
        c.weight_offset = 0.1;
        c.partial = 0.33;
        chosen.push_back(c);
        c.bias = tensor(weight);
        c.eps = 0;
        chosen.push_back(c);
      }
    }
  }
  return chosen;
}

TEST(FloatEnvironment, IsIgnoredAndRestored) {
  const Mode ordinary = mode();
  std::size_t turn = 0;
  for (const Case& c : cases()) {
    ForwardProblem problem(c);
    // One ordinary row, one of denormals, one whose squares overflow.
    const double largest = decode(c.x.dtype, encode(c.x.dtype, INFINITY) - 1);
    for (std::int64_t i = 0; i < 300; ++i) {
      problem.x.set(300 + i, decode(c.x.dtype, 1) * static_cast<double>(i));
      problem.x.set(600 + i, largest / (1 + static_cast<double>(i)));
    }
    problem.keep();
    for (const Isa isa : available_isas()) {
      const Results expected = problem.run(isa);
      for (const Mode strange : strange_modes) {
        if (grid_is_small() && ++turn % 9 != 0) continue;
        const rmsnorm::ForwardParams p = problem.params();
        problem.run(isa, {});  // fresh outputs
        set_mode(strange);
        const rmsnorm::Status status = rmsnorm::cpu::forward(p, 0, 3, isa);
        const Mode after = mode();
        set_mode(ordinary);
        ASSERT_TRUE(status.ok());
        EXPECT_EQ(after & ~exception_flags, strange) << name(isa);
        expect_same(c, expected, problem.results(), name(isa));
      }
    }
    if (HasFailure()) break;
  }
}

TEST(FloatEnvironment, OfBackward) {
  const Mode ordinary = mode();
  for (const DType t : all_dtypes) {
    GradientCase c;
    c.forward.sizes = {20, 90};
    c.forward.x = c.forward.weight = c.dy = c.dx = c.d_residual = tensor(t);
    c.dweight = c.dbias = tensor(t, Layout::reversed);
    c.forward.weight_offset = 0.1;
    // Less than any normal number: k is one element, and eps counts beside the denormals.
    c.forward.partial = 0x1p-1060;
    c.forward.eps = 0x1p-1060;
    for (const bool tiny : {true, false}) {
      if (!tiny) c.forward.partial = c.forward.eps = 1;
      BackwardProblem problem(c, rmsnorm::cpu::backward_workspace);
      for (std::int64_t i = 0; i < 90; ++i) {
        problem.x.set(i, decode(t, 1) * static_cast<double>(1 + i));
        problem.dy.set(90 + i, decode(t, 1) * static_cast<double>(i));
        problem.d_residual.set(90 + i, decode(t, 1) * static_cast<double>(i));
      }
      problem.keep();
      for (const Isa isa : available_isas()) {
        const auto compute = [&](Mode m) {
          return [&, m](const rmsnorm::BackwardParams& p) {
            set_mode(m);
            const std::int64_t blocks = rmsnorm::cpu::backward_blocks(p);
            rmsnorm::Status status = rmsnorm::cpu::backward(p, 0, blocks, isa);
            if (status.ok()) status = rmsnorm::cpu::backward_reduce(p, 0, 90, isa);
            const std::int64_t bytes = rmsnorm::cpu::backward_workspace(p);
            const Mode after = mode();
            set_mode(ordinary);
            EXPECT_EQ(after & ~exception_flags, m & ~exception_flags) << name(isa);
            EXPECT_EQ(blocks, 3);
            EXPECT_EQ(bytes, p.workspace_bytes);
            return status;
          };
        };
        const GradientResults expected = problem.run(compute(ordinary), name(isa));
        for (const Mode strange : strange_modes) {
          expect_same(c, expected, problem.run(compute(strange), name(isa)), name(isa));
        }
      }
    }
  }
}

TEST(FloatEnvironment, OfMeanSquare) {
  const Mode ordinary = mode();
  std::vector<float> x(500);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = 1e-41f * static_cast<float>(i);
  rmsnorm::MeanSquareParams p;
  double out = 0;
  p.x = rmsnorm::matrix<const float>(x.data(), 1, 500);
  p.mean_square = rmsnorm::vector(&out, 1);
  p.partial = 0.77;
  for (const Isa isa : available_isas()) {
    ASSERT_TRUE(rmsnorm::cpu::mean_square(p, 0, 1, isa).ok());
    const double expected = out;
    EXPECT_NE(expected, 0.0);
    for (const Mode strange : strange_modes) {
      out = 0;
      set_mode(strange);
      rmsnorm::cpu::mean_square(p, 0, 1, isa);
      const Mode after = mode();
      set_mode(ordinary);
      EXPECT_EQ(after & ~exception_flags, strange);
      EXPECT_EQ(out, expected) << name(isa);
    }
  }
}

#endif

}  // namespace
}  // namespace rmsnorm_test
