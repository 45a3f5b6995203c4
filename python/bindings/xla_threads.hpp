// Threads for calls from XLA: work split over the threads that XLA computes with.
#pragma once

#include "threads.hpp"
#include "xla_ffi.hpp"

namespace rmsnorm::python::xla {

// Gives an error that is of no consequence back to XLA; null is none.
void discard(const CallFrame& frame, Error* error);

// Does a step of a computation, in ranges that cover its units, on this thread and on as many of
// XLA's as the step has work for and set_thread_limit allows. Neither needs nor touches the GIL.
Status run_step(const CallFrame& frame, const void* params, const Step& step);

}  // namespace rmsnorm::python::xla
