// The ways to compute backward that a test program has, as implementations.hpp has them for
// forward.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "backward_problem.hpp"

namespace rmsnorm_test {

struct GradientImplementation {
  std::string name;
  BackwardProblem::WorkspaceBytes workspace_bytes;
  BackwardProblem::Compute backward;  // of all rows, on memory that it can reach
  // Has a function compute the problem, on its memory or on copies that `backward` can reach.
  std::function<GradientResults(BackwardProblem&, const BackwardProblem::Compute&)> run_on;

  GradientResults run(BackwardProblem& problem) const { return run_on(problem, backward); }
};

// The first is the reference where several are to agree.
const std::vector<GradientImplementation>& gradient_implementations();

}  // namespace rmsnorm_test
