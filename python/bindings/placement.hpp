// Where a call runs: on the CPU, or on a CUDA device and one of its streams.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace rmsnorm::python {

namespace nb = nanobind;

struct Call;

struct Placement {
  bool on_cuda = false;
  int device = 0;
  std::uintptr_t stream = 0;       // a cudaStream_t
  bool on_current_stream = true;   // of x's framework; the caller gave none
  const char* argument = nullptr;  // which array is on that device
};

// From the devices of the call's arrays, which must agree, and the caller's stream: None, a handle
// as an integer, or a stream object of torch, CuPy or anything with __cuda_stream__. None is the
// current stream of x's framework; the default stream where the framework has none to tell. Arrays
// that waited for the stream are read. The memory of the others has been.
Placement place(Call& call, nb::handle stream);

// RuntimeError: CUDA failed, with an error of its own, on the device of the call.
[[noreturn]] void raise_cuda(int error, const Placement& placement);

// Memory of the device that can be used, and freed, in the order of the stream. `what` it is for
// begins the MemoryError where there is none left; whatever else fails is a RuntimeError.
void* allocate_on_device(const Placement& placement, std::int64_t bytes, const char* what);

}  // namespace rmsnorm::python
