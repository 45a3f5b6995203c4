// The work of an operation on the CPU as steps for threads.
#pragma once

#include <rmsnorm/rmsnorm.hpp>

#include "call.hpp"
#include "threads.hpp"

namespace rmsnorm::python {

// `params` was made of `call`; the steps take its address as their params.
Step row_step(const Call& call, const ForwardParams& params);
Step row_step(const Call& call, const MeanSquareParams& params);

struct BackwardSteps {
  Step step[2];
  int count;
};

// `pass` has the parameters made of `call` and its workspace set; the steps take its address as
// their params.
BackwardSteps backward_steps(const Call& call, const cpu::BackwardPass& pass);

}  // namespace rmsnorm::python
