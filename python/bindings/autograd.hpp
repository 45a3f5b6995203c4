// Derivatives of torch tensors. None is lost silently: a call with tensors that require grad
// becomes an operator of rmsnorm.torch, which autograd knows, or it is refused.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <rmsnorm/contract.hpp>

#include "call.hpp"

namespace rmsnorm::python {

namespace nb = nanobind;

// Which of the call's arrays are torch tensors that require grad, in grad mode. Code of the
// caller's may change that while options are read, so it is asked behind them.
void read_requires_grad(Call& call);

// Whether a tensor of the call requires grad, in grad mode, and an operator can take the call: all
// arrays are torch tensors, none is given for a result, and no stream.
bool is_differentiable(const Call& call, nb::handle stream);

// What the operators return, which the results of the functions are. Options are those of the call,
// whose x has a first axis.
nb::object differentiable_rms_norm(Call& call, nb::handle rounding, std::optional<DType> out_dtype,
                                   bool with_rstd);
nb::object differentiable_add_rms_norm(Call& call, nb::handle rounding, bool with_rstd);

// RuntimeError naming the argument whose derivative would be lost.
void require_no_derivatives(const Call& call);

// TypeError for an option that is a torch tensor with a derivative. torch makes a number of it with
// no more than a warning.
void refuse_lost_derivative(nb::handle option, const char* name);

}  // namespace rmsnorm::python
