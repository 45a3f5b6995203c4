// What is ordered behind what. The emulation has done all work when a call returns, but a device
// may not have begun: memory of cudaMallocAsync must be freed behind everything that uses it, on
// whichever stream. Whoever frees it earlier is told, and the process aborts.
//
// Streams are those of the calling thread's device. Handles that no cudaStreamCreate returned stand
// for streams that do not wait for the default one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "host_interface.h"

namespace cuda_emulation {

// How much of each stream's work, by the stream's number.
using Clock = std::map<std::uint64_t, std::uint64_t>;

void add_stream(cudaStream_t stream, bool waits_for_default);
void remove_stream(cudaStream_t stream);

void add_memory(void* p, std::size_t bytes, cudaStream_t stream);
// False for memory that was not added.
bool remove_memory(void* p, cudaStream_t stream);
// By a call that assumes all uses to be over.
bool remove_idle_memory(void* p);

// Work that uses what the pointers among some bytes point to.
void add_work(cudaStream_t stream, const void* pointers, std::size_t bytes);

// All that the stream has been given until now and waits for.
Clock progress_of(cudaStream_t stream);
void wait_for(cudaStream_t stream, const Clock& progress);

void host_waits_for(cudaStream_t stream);
void host_waits_for_device();

}  // namespace cuda_emulation
