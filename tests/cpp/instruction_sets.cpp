#include "instruction_sets.hpp"

#include "formula.hpp"
#include "gradient_implementations.hpp"
#include "implementations.hpp"
#include "rmsnorm/bounds.hpp"

namespace rmsnorm_test {

using rmsnorm::cpu::Isa;

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : rmsnorm::cpu::every_isa) {
    if (rmsnorm::cpu::available(isa)) isas.push_back(isa);
  }
  return isas;
}

const std::vector<Implementation>& implementations() {
  static const std::vector<Implementation> all = [] {
    std::vector<Implementation> each;
    for (const Isa isa : available_isas()) {
      const std::string name = rmsnorm::cpu::name(isa);
      each.push_back({name,
                      [isa](const rmsnorm::ForwardParams& p) {
                        const std::int64_t rows = rmsnorm::row_count(p.x, p.axis);
                        return rmsnorm::cpu::forward(p, 0, rows, isa);
                      },
                      [name](ForwardProblem& problem, const Implementation::Forward& forward) {
                        return problem.run(forward, name);
                      }});
    }
    return each;
  }();
  return all;
}

const std::vector<GradientImplementation>& gradient_implementations() {
  static const std::vector<GradientImplementation> all = [] {
    std::vector<GradientImplementation> each;
    for (const Isa isa : available_isas()) {
      const std::string name = rmsnorm::cpu::name(isa);
      each.push_back({name, rmsnorm::cpu::backward_workspace,
                      [isa](const rmsnorm::BackwardParams& p) {
                        std::int64_t n = 1;
                        const int axis = p.axis < 0 ? p.axis + p.x.rank : p.axis;
                        for (int d = axis; d < p.x.rank; ++d) n *= p.x.sizes[d];
                        const std::int64_t blocks = rmsnorm::cpu::backward_blocks(p);
                        const rmsnorm::Status status = rmsnorm::cpu::backward(p, 0, blocks, isa);
                        return status.ok() ? rmsnorm::cpu::backward_reduce(p, 0, n, isa) : status;
                      },
                      [name](BackwardProblem& problem, const BackwardProblem::Compute& backward) {
                        return problem.run(backward, name);
                      }});
    }
    return each;
  }();
  return all;
}

double rstd_budget(const Case& c) {
  return rmsnorm::cpu_rstd_bound(c.compute_type(), is_all_16_bit(c), c.n());
}

int sampling() { return 1; }

}  // namespace rmsnorm_test
