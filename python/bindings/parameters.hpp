// From a call to the library's parameter structs. The library takes up to rmsnorm::max_rank
// dimensions and Python arrays may have more: adjacent dimensions that every array of the call
// steps through as one are merged first.
#pragma once

#include <rmsnorm/contract.hpp>

#include "call.hpp"

namespace rmsnorm::python {

// Whether the dimensions of an array of the call follow from those of x, which has a first axis, as
// the argument's must.
Status check_shape(const Call& call, Argument argument);

// `call.x` has a first axis. A status other than ok: the shapes do not fit, or do not merge.
Status make_parameters(const Call& call, ForwardParams& p);
Status make_parameters(const Call& call, MeanSquareParams& p);
Status make_parameters(const Call& call, BackwardParams& p);

}  // namespace rmsnorm::python
