// Every instruction set gives the bits of the scalar code.
#include <gtest/gtest.h>

#include "case_grid.hpp"
#include "instruction_sets.hpp"

namespace rmsnorm_test {
namespace {

void expect_agreement(ForwardProblem& problem) {
  const Results expected = problem.run(Isa::scalar);
  for (const Isa isa : available_isas()) {
    if (isa == Isa::scalar) continue;
    expect_same(problem.description(), expected, problem.run(isa), name(isa));
  }
}

TEST(IsaAgreement, OverTheGrid) {
  for (const Case& c : all_cases()) {
    ForwardProblem problem(c);
    expect_agreement(problem);
    if (HasFailure()) break;
  }
}

TEST(IsaAgreement, OnArbitraryBits) {
  const int rounds = grid_is_small() ? 40 : 2000;
  Random random(3);
  for (int i = 0; i < rounds; ++i) {
    Case c;
    c.sizes = {2, 1 + random.below(400)};
    c.x = tensor(all_dtypes[random.below(4)]);
    c.weight = tensor(i % 3 == 0 ? all_dtypes[random.below(4)] : c.x.dtype);
    c.y = tensor(i % 4 == 0 ? all_dtypes[random.below(4)] : c.x.dtype);
    if (i % 5 == 0) c.residual = c.residual_out = tensor(c.x.dtype);
    c.rounding = static_cast<Rounding>(random.below(3));
    c.eps = i % 2 == 0 ? 0 : 1e-6;
    c.rstd = tensor(c.rstd_type());
    ForwardProblem problem(c);
    // Exponents within a random span, so that overflow, underflow and ordinary sums all occur.
    const int width = c.x.dtype == DType::f64 ? 64 : c.x.dtype == DType::f32 ? 32 : 16;
    const std::uint64_t stuck = random.bits(), free = random.bits() | (random.bits() >> 12);
    for (GuardedTensor* t : {&problem.x, &problem.residual}) {
      for (std::int64_t k = 0; k < t->count(); ++k) {
        const std::uint64_t bits = (stuck & ~free) | (random.bits() & free);
        t->set_bits(k, width == 64 ? bits : bits & ((std::uint64_t{1} << width) - 1));
      }
    }
    problem.keep();
    expect_agreement(problem);
    if (HasFailure()) break;
  }
}

TEST(IsaAgreement, OnLongRows) {
  const std::int64_t longest = grid_is_small() ? 5000 : (1 << 20) + 77;
  for (const DType t : all_dtypes) {
    Case c;
    c.sizes = {1, longest};
    c.x = c.weight = c.y = tensor(t);
    c.rstd = tensor(c.rstd_type());
    ForwardProblem problem(c);
    expect_agreement(problem);
  }
}

}  // namespace
}  // namespace rmsnorm_test
