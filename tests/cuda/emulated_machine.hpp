// The devices of the emulated tests. What the library asks of a device it asks once in a process,
// so that the table must not change: tests that need another one run in a process of their own.
#pragma once

#include "cuda_runtime.h"

namespace rmsnorm_test {

enum EmulatedDevice : int {
  usual_device,  // the one that the kernels are compiled for
  other_device,  // another of the kind
  older_device,  // has no code that it could run
  newer_device,  // runs the code of the usual one, with more shared memory
  fresh_device,  // of the usual kind, for one test alone
  emulated_device_count
};

}  // namespace rmsnorm_test
