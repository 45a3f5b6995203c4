// The tests' side of the emulation: what machine it is, how threads interleave, what was launched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "host_interface.h"
#include "vector_types.h"

namespace cuda_emulation {

struct Device {
  // With the shared memory that the architecture lets one block opt into, and a binary for it.
  Device(int major_, int minor_, int multiprocessors_ = 4);

  int major, minor;
  int multiprocessors;
  int shared_memory_opt_in;  // bytes
  int ptx_version;           // of the kernels' code, as 75; later than the device: it has no image
  bool driver = true;        // false on any device: the machine's driver is too old
};

// Replaces all devices, without contexts, and makes device 0 the calling thread's. In the beginning
// there is one device, of the architecture that the emulation was compiled for, or as many as the
// environment variable CUDA_EMULATION_DEVICES says; "no driver" there is a machine without one.
void set_devices(std::vector<Device> devices);

// Whether anybody retains the device's primary context.
bool has_context(int device);
// Contexts on the calling thread's stack of them.
std::size_t context_stack_size();

// Restarts the order in which blocks, warps and lanes run; 0 runs them in order.
void set_seed(std::uint64_t seed);

// The next launch, or the one after so many others, runs nothing and returns the error.
void fail_next_launch(cudaError_t error, int others = 0);

// Calls `work` as the next launch is asked for: what another host thread does between the calls
// before that launch and the launch itself.
void interrupt_next_launch(std::function<void()> work);

// What the grid ahead of the next launch still does after that launch has started: called when its
// first thread calls cudaGridDependencySynchronize.
void finish_previous_grid_late(std::function<void()> work);

// Calls so far of the functions that ask about devices and kernels or set something, all but
// cudaGetDevice.
std::uint64_t device_calls();

struct LastLaunch {
  dim3 grid, block, cluster;
  std::size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  int device = 0;
  bool programmatic = false;  // programmaticStreamSerializationAllowed
  const void* kernel = nullptr;

  // By the linear index of the block: barriers passed.
  std::vector<unsigned> block_barriers;
  std::vector<unsigned> cluster_barriers;

  // Threads that called it at least once.
  std::uint64_t waited_for_previous_grid = 0;
  std::uint64_t allowed_next_grid = 0;

  std::uint64_t launches = 0;  // that ran, since the program started
};

LastLaunch last_launch();
LastLaunch launch_before_last();

}  // namespace cuda_emulation
