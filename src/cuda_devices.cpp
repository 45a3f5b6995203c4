#include "cuda_devices.hpp"

#include <cuda_runtime.h>

#include <cstring>

namespace rmsnorm {
namespace cuda {
namespace {

// As int, and no longer the last error, which the caller's next check would find.
int taken(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : error_(cudaGetDevice(&previous_)) {
    if (error_ != cudaSuccess || device == previous_) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

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
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return taken(current.error());
  return taken(cudaMallocAsync(memory, bytes, static_cast<cudaStream_t>(stream)));
}

int memory_free_async(void* memory, void* stream, int device) noexcept {
  if (memory == nullptr) return 0;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return taken(current.error());
  return taken(cudaFreeAsync(memory, static_cast<cudaStream_t>(stream)));
}

int make_stream_wait(void* waiting, void* producing, int device) noexcept {
  if (waiting == producing) return 0;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return taken(current.error());
  cudaEvent_t event;
  cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (error != cudaSuccess) return taken(error);
  error = cudaEventRecord(event, static_cast<cudaStream_t>(producing));
  if (error == cudaSuccess) {
    error = cudaStreamWaitEvent(static_cast<cudaStream_t>(waiting), event, 0);
  }
  // The wait stays in force without the event.
  const cudaError_t destroyed = cudaEventDestroy(event);
  return taken(error != cudaSuccess ? error : destroyed);
}

}  // namespace cuda
}  // namespace rmsnorm
