// Which devices have a primary context, and which of them the calling thread works on. A thread has
// a stack of contexts, of which the driver's functions change the top. Where it is empty, the
// runtime goes by the device that the thread chose, and makes its context at the first call that
// needs one.
#pragma once

#include <cstdint>

namespace cuda_emulation {

int thread_device();

// As cudaSetDevice.
void choose_device(int device);

// What every call of the runtime that needs a context does first. A number that no context before
// it had.
std::uint64_t use_context();

// Destroys the contexts of all devices, or that of one, whoever retains it.
void reset_contexts(int device_count);
void reset_context(int device);

// By its name; null for functions that are not declared in cuda.h.
void* driver_function(const char* name);

}  // namespace cuda_emulation
