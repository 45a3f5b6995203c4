// CUDA kernels on the CPU: with this directory first on the include path, unmodified kernel sources
// compile with g++ or clang++ and run, also under AddressSanitizer and UBSan.
//
// Every CUDA thread is a fibre. The blocks of a cluster run together, blocks outside clusters one
// after the other, all on the calling OS thread; a launch has finished when it returns. A fibre
// runs until a barrier or warp operation that others have not reached. With seed 0 fibres run in
// order; any other seed shuffles blocks, warps and lanes again at every turn, so that a missing
// barrier shows as a difference between seeds. Shared memory is one heap allocation per block, of
// exactly the launch's size and filled with 0xff: overruns are AddressSanitizer's to see.
//
// What hardware leaves undefined or hangs on is reported with its coordinates, and the process
// aborts: a barrier or warp operation that a thread misses by exiting or by waiting elsewhere, a
// barrier reached at different source lines, lanes that the mask or the block does not have,
// shared memory of a block that has not started or has exited. This is stricter than the hardware,
// whose barriers let exited threads pass.
//
// Not emulated: memory ordering between threads that run truly at once, spinning on memory (it
// never yields and hangs), register and occupancy limits, streams that run at once, but for what
// stream_order.hpp says of freed memory. A launch from
// inside a kernel, __shared__ variables and everything else that is not declared here is missing
// on purpose.
#pragma once

#if defined(__FAST_MATH__)
#error "device arithmetic is IEEE: compile without -ffast-math"
#endif

#include "device_arithmetic.h"
#include "device_language.h"
#include "host_interface.h"
#include "settings.hpp"
