#include "cuda_devices.hpp"

#include <cuda_runtime.h>

#include <cstring>
#include <rmsnorm/cuda/device_guard.cuh>

namespace rmsnorm {
namespace cuda {
namespace {

// As int, and no longer the last error, which the caller's next check would find.
int taken(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

static_assert(out_of_memory == cudaErrorMemoryAllocation, "");
static_assert(insufficient_driver == cudaErrorInsufficientDriver, "");
static_assert(no_device == cudaErrorNoDevice, "");
static_assert(invalid_device == cudaErrorInvalidDevice, "");

// Calls work() with the device current.
template <class Work>
int on_device(int device, const Work& work) {
  const detail::DeviceGuard guard(device);
  return taken(guard.error() == cudaSuccess ? work() : guard.error());
}

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t as_event(void* event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

BuildInfo build_info() noexcept { return {true, CUDART_VERSION, RMSNORM_CUDA_ARCHITECTURES}; }

int driver_version() noexcept {
  int version = 0;
  return taken(cudaDriverGetVersion(&version)) == 0 ? version : 0;
}

int device_count(int* error) noexcept {
  int count = 0;
  *error = taken(cudaGetDeviceCount(&count));
  return *error == 0 ? count : 0;
}

int describe_device(int device, DeviceInfo* info) noexcept {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return taken(error);
  static_assert(sizeof(info->name) == sizeof(properties.name), "room for the name");
  std::memcpy(info->name, properties.name, sizeof(info->name));
  info->major = properties.major;
  info->minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  info->total_memory = static_cast<long long>(properties.totalGlobalMem);
  return 0;
}

int memory_allocate_async(void** memory, std::size_t bytes, void* stream, int device) noexcept {
  *memory = nullptr;
  if (bytes == 0) return 0;
  return on_device(device, [&] { return cudaMallocAsync(memory, bytes, as_stream(stream)); });
}

int memory_free_async(void* memory, void* stream, int device) noexcept {
  if (memory == nullptr) return 0;
  return on_device(device, [&] { return cudaFreeAsync(memory, as_stream(stream)); });
}

int memory_free_behind(void* memory, void* event, int device) noexcept {
  return on_device(device, [&] {
    const cudaError_t waiting = cudaStreamWaitEvent(nullptr, as_event(event), 0);
    // The wait stays in force without the event.
    const cudaError_t destroyed = cudaEventDestroy(as_event(event));
    if (waiting != cudaSuccess) return waiting;
    const cudaError_t freed = memory == nullptr ? cudaSuccess : cudaFreeAsync(memory, nullptr);
    return freed != cudaSuccess ? freed : destroyed;
  });
}

int record_event(void** event, void* stream, int device) noexcept {
  *event = nullptr;
  return on_device(device, [&] {
    cudaEvent_t made = nullptr;
    cudaError_t error = cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
    if (error != cudaSuccess) return error;
    error = cudaEventRecord(made, as_stream(stream));
    if (error == cudaSuccess)
      *event = made;
    else
      cudaEventDestroy(made);
    return error;
  });
}

int make_stream_wait(void* stream, void* event, int device) noexcept {
  return on_device(device,
                   [&] { return cudaStreamWaitEvent(as_stream(stream), as_event(event), 0); });
}

}  // namespace cuda
}  // namespace rmsnorm
