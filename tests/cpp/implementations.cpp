#include "implementations.hpp"

namespace rmsnorm_test {

Results Implementation::run(ForwardProblem& problem, const Adjust& adjust) const {
  if (!adjust) return run_on(problem, forward);
  return run_on(problem, [&](rmsnorm::ForwardParams p) {
    adjust(p);
    return forward(p);
  });
}

}  // namespace rmsnorm_test
