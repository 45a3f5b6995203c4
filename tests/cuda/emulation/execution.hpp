// What the fake CUDA headers ask of the scheduler. Everything but run() is called by threads of a
// kernel, and fails loudly elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector_types.h"

struct CUstream_st;

namespace cuda_emulation {

// Where a kernel calls a barrier: two lines are two barriers, whatever the compiler made of them.
struct CallSite {
  const char* file;
  int line;

  static constexpr CallSite here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return CallSite{file, line};
  }
};

// This block's shared memory, 16-byte aligned.
void* shared_memory();

void block_barrier(CallSite site);

enum class WarpOperation {
  sync,
  any,
  ballot,
  shuffle_32,
  shuffle_64,
  shuffle_xor_32,
  shuffle_xor_64
};

// Returns when all lanes of the mask have called it alike: the value of the lane `source`, or the
// ballot of the lanes with nonzero values.
std::uint64_t warp_operation(WarpOperation operation, unsigned mask, std::uint64_t value,
                             unsigned source, CallSite site);
unsigned lane();

void cluster_arrive(CallSite site);
void cluster_wait(CallSite site);
unsigned cluster_rank();
unsigned cluster_size();
// The place in another block's shared memory that p is in this one's.
void* map_shared(void* p, unsigned rank, CallSite site);

void wait_for_previous_grid();
void allow_next_grid();

// Reports a fault of the running thread and aborts.
[[noreturn]] void fail(const char* message, CallSite site);

struct Launch {
  dim3 grid, block, cluster;
  std::size_t shared_bytes;
  CUstream_st* stream;
  int device;
  bool programmatic;
  const void* kernel;
  // Calls the kernel with the arguments, once for every thread.
  void (*call)(const void* arguments);
  const void* arguments;
};

// The launch must be a valid one. One runs at a time; others wait.
void run(const Launch& launch);

// Whether the caller is a thread of a kernel.
bool in_kernel();

}  // namespace cuda_emulation
