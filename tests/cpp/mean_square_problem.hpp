// One call of mean_square: what it is asked to do, memory for it, and what came out.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "forward_problem.hpp"

namespace rmsnorm_test {

class MeanSquareProblem {
 public:
  MeanSquareProblem(DType t, DType out_type, const std::vector<std::int64_t>& sizes,
                    std::int32_t axis, Layout layout, double partial);

  const Case& description() const { return case_; }
  rmsnorm::MeanSquareParams params() const;

  // For other contents than the ordinary ones; call `keep` when done.
  GuardedTensor x;
  void keep();
  std::vector<GuardedTensor*> memories() { return {&x, &out_}; }

  // Runs it on a fresh output and reports as test failures: a status other than ok, and any byte
  // changed that does not belong to the output of these rows.
  using Compute = std::function<rmsnorm::Status(const rmsnorm::MeanSquareParams&)>;
  std::vector<std::uint64_t> run(const Compute& compute, const std::vector<Range>& rows);
  std::vector<std::uint64_t> run(const Compute& compute) {
    return run(compute, {{0, case_.rows()}});
  }

  // Of every row, in extended precision.
  std::vector<long double> exact() const;

 private:
  Case case_;
  GuardedTensor out_;
};

}  // namespace rmsnorm_test
