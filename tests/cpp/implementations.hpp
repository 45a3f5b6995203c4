// The ways to compute forward that a test program has: every instruction set of this CPU in one,
// the CUDA device in the other. Tests of results are written over them.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "forward_problem.hpp"

namespace rmsnorm_test {

struct Implementation {
  using Forward = std::function<rmsnorm::Status(const rmsnorm::ForwardParams&)>;
  using Adjust = std::function<void(rmsnorm::ForwardParams&)>;

  std::string name;
  Forward forward;  // on all rows of memory that it can reach
  // Has a function compute the problem, on its memory or on copies that `forward` can reach.
  std::function<Results(ForwardProblem&, const Forward&)> run_on;

  // The problem as it is, or with some of its parameters changed.
  Results run(ForwardProblem& problem, const Adjust& adjust = nullptr) const;
};

// The first is the reference where several are to agree.
const std::vector<Implementation>& implementations();

// How far rstd may be from 1 / sqrt of the exact mean square, in ulps.
double rstd_budget(const Case& c);

// One of how many cases is run where running all takes long.
int sampling();

}  // namespace rmsnorm_test
