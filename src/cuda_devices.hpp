// What the Python module asks of CUDA beside the norms: what was built, which devices there are,
// and memory and order for arrays whose framework offers neither. Part of the compiled library and
// of no installed header.
//
// No CUDA header is needed. Errors are cudaError_t as int, 0 for success;
// rmsnorm::cuda::error_text() has their text. No error stays behind as CUDA's last one. In a build
// without CUDA every function that can fail returns `unavailable`.
#pragma once

#include <cstddef>

namespace rmsnorm {
namespace cuda {

constexpr int unavailable = -1;
// The errors that are told apart.
constexpr int out_of_memory = 2;
constexpr int insufficient_driver = 35;  // too old, or there is none
constexpr int no_device = 100;
constexpr int invalid_device = 101;

struct BuildInfo {
  bool built;
  int toolkit;                // as 13000; 0 without CUDA
  const char* architectures;  // as "75;80;90"; "emulated" where kernels run on the CPU
};
BuildInfo build_info() noexcept;

// Of CUDA that the driver supports, as 13000; 0 without a driver.
int driver_version() noexcept;

// 0 on an error, which a machine without a driver or device is.
int device_count(int* error) noexcept;

struct DeviceInfo {
  char name[256];
  int major, minor;
  int multiprocessors;
  long long total_memory;
};
int describe_device(int device, DeviceInfo* info) noexcept;

// Ordered on the stream of the device; zero bytes are a null pointer.
int memory_allocate_async(void** memory, std::size_t bytes, void* stream, int device) noexcept;
int memory_free_async(void* memory, void* stream, int device) noexcept;

// Frees in the order of the default stream and behind the event, without the stream that it was
// recorded on, which may be gone. Memory that cannot be ordered so is kept. Destroys the event.
int memory_free_behind(void* memory, void* event, int device) noexcept;

// A new event, behind all that the stream of the device has been given until now. Null on an error.
int record_event(void** event, void* stream, int device) noexcept;

// What is put on the stream of the device from now on starts behind the event.
int make_stream_wait(void* stream, void* event, int device) noexcept;

}  // namespace cuda
}  // namespace rmsnorm
