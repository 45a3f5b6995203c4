// Errors: the one place where a status of the library becomes a Python exception, and the ways in
// which the bindings raise their own. Messages read "argument: what is wrong; what was expected".
#pragma once

#include <nanobind/nanobind.h>

#include <rmsnorm/contract.hpp>
#include <string>

#include "dlpack.hpp"
#include "object_text.hpp"

namespace rmsnorm::python {

namespace nb = nanobind;

struct ArrayView;
struct Call;

// Raises `type` with a printf-formatted message.
[[noreturn]] void raise(PyObject* type, const char* format, ...);

// The same with an exception that was caught as the cause (__cause__). A cause that is no Exception
// (KeyboardInterrupt, SystemExit), or RecursionError, is thrown in place of it.
[[noreturn]] void raise_from(nb::python_error& cause, PyObject* type, const char* format, ...);

// TypeError naming the dtypes that the view's argument may have and the one that came.
[[noreturn]] void raise_unsupported_dtype(const std::string& dtype, const ArrayView& view);

// `call` is where the values for the message come from. For errors of CUDA: raise_cuda.
[[noreturn]] void raise_status(const Status& status, const Call& call);

// For a call whose arrays no device can reach together: ValueError where devices are mixed,
// RuntimeError where they are of a kind that is not supported.
[[noreturn]] void raise_device(const Call& call);

// RuntimeError for CUDA arrays in a build without CUDA; the call has one.
[[noreturn]] void raise_without_cuda(const Call& call);

// As "13.0", from CUDA's 1000 major + 10 minor.
std::string cuda_version_text(int version);

// CUDA's text for a cudaError_t.
const char* cuda_text(int error);

// How a message about a device goes on: what failed there, and what can be done about it.
std::string cuda_failure_text(int error);

// As users know it: "cuda:1".
std::string device_text(const dlpack::Device& device);

// Why RMSNORM_ISA cannot be followed. Takes no GIL.
std::string isa_error_text();

}  // namespace rmsnorm::python
