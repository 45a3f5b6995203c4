#include "host_interface.h"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "contexts.hpp"
#include "settings.hpp"
#include "stream_order.hpp"

struct CUstream_st {};
struct CUevent_st {
  cuda_emulation::Clock progress;
};

namespace cuda_emulation {
namespace {

constexpr int default_shared_memory = 48 << 10;
constexpr unsigned portable_cluster_size = 8;
constexpr unsigned largest_cluster_size = 16;

struct KernelAttributes {
  int shared_memory = default_shared_memory;
  bool large_clusters = false;
};

std::vector<Device> devices_at_first() {
  std::vector<Device> devices{Device(__CUDA_ARCH__ / 100, __CUDA_ARCH__ / 10 % 10)};
  const char* const wanted = std::getenv("CUDA_EMULATION_DEVICES");
  if (wanted == nullptr) return devices;
  devices[0].driver = std::strcmp(wanted, "no driver") != 0;
  if (devices[0].driver) devices.resize(std::strtoul(wanted, nullptr, 10), devices[0]);
  return devices;
}

struct Machine {
  std::mutex mutex;
  std::vector<Device> devices = devices_at_first();
  // A kernel's of one context, whichever threads set them.
  std::map<std::pair<std::uint64_t, const void*>, KernelAttributes> kernels;
  std::function<void()> interruption;
  cudaError_t failing_launch = cudaSuccess;
  int launches_before_failing = 0;
  std::uint64_t device_calls = 0;
};

Machine& machine() {
  static Machine& machine = []() -> Machine& {
    Machine& made = *new Machine;
    reset_contexts(static_cast<int>(made.devices.size()));
    return made;
  }();
  return machine;
}

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t check_machine(const Machine& m) {
  if (m.devices.empty()) return cudaErrorNoDevice;
  for (const Device& device : m.devices) {
    if (!device.driver) return cudaErrorInsufficientDriver;
  }
  return cudaSuccess;
}

// The device of that number, or the error that asking for it gives.
cudaError_t find_device(const Machine& m, int number, const Device** device) {
  const cudaError_t error = check_machine(m);
  if (error != cudaSuccess) return error;
  if (number < 0 || number >= static_cast<int>(m.devices.size())) return cudaErrorInvalidDevice;
  *device = &m.devices[static_cast<std::size_t>(number)];
  return cudaSuccess;
}

int architecture(const Device& device) { return device.major * 10 + device.minor; }

// The current device, if a kernel can run there.
cudaError_t find_kernel_device(const Machine& m, const void* kernel, const Device** device) {
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const cudaError_t error = find_device(m, thread_device(), device);
  if (error != cudaSuccess) return error;
  const bool runs = (*device)->ptx_version != 0 && (*device)->ptx_version <= architecture(**device);
  return runs ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

// What calls do first that need a device, and through it a context.
cudaError_t enter() {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  const cudaError_t error = check_machine(m);
  if (error == cudaSuccess) use_context();
  return remember(error);
}

std::uint64_t volume(dim3 size) { return std::uint64_t{size.x} * size.y * size.z; }

cudaError_t check_grid(dim3 grid, dim3 block) {
  if (volume(grid) == 0 || grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu) {
    return cudaErrorInvalidConfiguration;
  }
  if (block.x > 1024 || block.y > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (volume(block) == 0 || volume(block) > 1024) return cudaErrorInvalidConfiguration;
  return cudaSuccess;
}

cudaError_t check_cluster(dim3 cluster, dim3 grid, const Device& device,
                          const KernelAttributes& kernel) {
  if (device.major < 9) return cudaErrorNotSupported;
  const std::uint64_t size = volume(cluster);
  const unsigned most = kernel.large_clusters ? largest_cluster_size : portable_cluster_size;
  if (size == 0 || size > most) return cudaErrorInvalidClusterSize;
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    return cudaErrorInvalidClusterSize;
  }
  return cudaSuccess;
}

cudaError_t check_launch(Machine& m, const cudaLaunchConfig_t& config, Launch& launch) {
  const bool fails = m.launches_before_failing-- <= 0;
  const cudaError_t failing = fails ? std::exchange(m.failing_launch, cudaSuccess) : cudaSuccess;
  if (failing != cudaSuccess) return failing;
  const Device* device = nullptr;
  cudaError_t error = find_kernel_device(m, launch.kernel, &device);
  if (error != cudaSuccess) return error;
  error = check_grid(config.gridDim, config.blockDim);
  if (error != cudaSuccess) return error;

  const auto found = m.kernels.find({use_context(), launch.kernel});
  const KernelAttributes kernel = found == m.kernels.end() ? KernelAttributes{} : found->second;
  if (config.dynamicSmemBytes > static_cast<std::size_t>(kernel.shared_memory)) {
    return cudaErrorInvalidValue;
  }
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& size = attribute.val.clusterDim;
      launch.cluster = dim3(size.x, size.y, size.z);
      error = check_cluster(launch.cluster, config.gridDim, *device, kernel);
      if (error != cudaSuccess) return error;
    } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      launch.programmatic = attribute.val.programmaticStreamSerializationAllowed != 0;
      if (launch.programmatic && device->major < 9) return cudaErrorNotSupported;
    } else {
      return cudaErrorInvalidValue;
    }
  }
  return cudaSuccess;
}

}  // namespace

Device::Device(int major_, int minor_, int multiprocessors_)
    : major(major_), minor(minor_), multiprocessors(multiprocessors_) {
  ptx_version = architecture(*this);
  int kibibytes = 48;
  switch (ptx_version) {
    case 70: kibibytes = 96; break;
    case 75: kibibytes = 64; break;
    case 80:
    case 87: kibibytes = 163; break;
    case 86:
    case 89:
    case 120:
    case 121: kibibytes = 99; break;
    case 90:
    case 100:
    case 103:
    case 110: kibibytes = 227; break;
  }
  shared_memory_opt_in = kibibytes << 10;
}

void set_devices(std::vector<Device> devices) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.devices = std::move(devices);
  reset_contexts(static_cast<int>(m.devices.size()));
}

std::uint64_t device_calls() {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  return m.device_calls;
}

void fail_next_launch(cudaError_t error, int others) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.failing_launch = error;
  m.launches_before_failing = others;
}

void interrupt_next_launch(std::function<void()> work) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.interruption = std::move(work);
}

namespace {

void interrupt() {
  std::function<void()> work;
  {
    Machine& m = machine();
    const std::lock_guard<std::mutex> lock(m.mutex);
    work.swap(m.interruption);
  }
  if (work) work();
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t* config, const void* kernel,
                   void (*call)(const void* arguments), const void* arguments,
                   std::size_t argument_bytes) {
  if (in_kernel()) fail("a launch inside a kernel", CallSite::here());
  interrupt();
  if (config == nullptr) return remember(cudaErrorInvalidValue);
  Launch launch{};
  launch.grid = config->gridDim;
  launch.block = config->blockDim;
  launch.shared_bytes = config->dynamicSmemBytes;
  launch.stream = config->stream;
  launch.device = thread_device();
  launch.kernel = kernel;
  launch.call = call;
  launch.arguments = arguments;
  {
    Machine& m = machine();
    const std::lock_guard<std::mutex> lock(m.mutex);
    const cudaError_t error = check_launch(m, *config, launch);
    if (error != cudaSuccess) return remember(error);
  }
  add_work(launch.stream, arguments, argument_bytes);
  run(launch);
  return cudaSuccess;
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorSymbolNotFound: return "cudaErrorSymbolNotFound";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorSymbolNotFound: return "named symbol not found";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorInvalidClusterSize: return "cluster misconfiguration";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* device) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  *device = thread_device();
  return remember(check_machine(m));
}

cudaError_t cudaSetDevice(int device) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  ++m.device_calls;
  const Device* found = nullptr;
  const cudaError_t error = find_device(m, device, &found);
  if (error == cudaSuccess) choose_device(device);
  return remember(error);
}

cudaError_t cudaGetDeviceCount(int* count) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  ++m.device_calls;
  const cudaError_t error = check_machine(m);
  *count = error == cudaSuccess ? static_cast<int>(m.devices.size()) : 0;
  return remember(error);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  ++m.device_calls;
  const Device* found = nullptr;
  const cudaError_t error = find_device(m, device, &found);
  if (error != cudaSuccess) return remember(error);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = found->multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = found->major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = found->minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = found->shared_memory_opt_in;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  const Device* found = nullptr;
  const cudaError_t error = find_device(m, device, &found);
  if (error != cudaSuccess) return remember(error);
  *properties = {};
  std::strcpy(properties->name, "emulated device");
  properties->totalGlobalMem = std::size_t{1} << 34;
  properties->major = found->major;
  properties->minor = found->minor;
  properties->multiProcessorCount = found->multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  *version = check_machine(m) == cudaErrorInsufficientDriver ? 0 : CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const cudaError_t error = enter();
  if (error == cudaSuccess) host_waits_for_device();
  return error;
}

cudaError_t cudaDeviceReset() {
  const cudaError_t error = enter();
  if (error == cudaSuccess) reset_context(thread_device());
  return error;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  ++m.device_calls;
  *function = driver_function(name);
  if (result != nullptr) {
    *result =
        *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return remember(check_machine(m));
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  ++m.device_calls;
  const Device* device = nullptr;
  const cudaError_t error = find_kernel_device(m, kernel, &device);
  if (error != cudaSuccess) return remember(error);
  const auto found = m.kernels.find({use_context(), kernel});
  attributes->sharedSizeBytes = 0;
  attributes->ptxVersion = device->ptx_version;
  attributes->binaryVersion = architecture(*device);
  attributes->maxDynamicSharedSizeBytes =
      found == m.kernels.end() ? default_shared_memory : found->second.shared_memory;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  ++m.device_calls;
  const Device* device = nullptr;
  const cudaError_t error = find_kernel_device(m, kernel, &device);
  if (error != cudaSuccess) return remember(error);
  KernelAttributes& attributes = m.kernels[{use_context(), kernel}];
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > device->shared_memory_opt_in) break;
      attributes.shared_memory = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (device->major < 9) return remember(cudaErrorNotSupported);
      attributes.large_clusters = value != 0;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  *p = nullptr;
  const cudaError_t error = enter();
  if (error != cudaSuccess || bytes == 0) return error;
  if (posix_memalign(p, 256, bytes) != 0) return remember(cudaErrorMemoryAllocation);
  std::memset(*p, 0xff, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  remove_idle_memory(p);
  std::free(p);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** p, std::size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cudaMalloc(p, bytes);
  if (*p != nullptr) add_memory(*p, bytes, stream);
  return error;
}

cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  const cudaError_t error = enter();
  if (error != cudaSuccess) return error;
  if (p != nullptr && !remove_memory(p, stream)) return remember(cudaErrorInvalidValue);
  std::free(p);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return error == cudaSuccess ? cudaStreamSynchronize(nullptr) : error;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  const cudaError_t error = enter();
  if (error != cudaSuccess || bytes == 0) return error;
  const void* const used[] = {to, from};
  add_work(stream, used, sizeof(used));
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t stream) {
  const cudaError_t error = enter();
  if (error != cudaSuccess || bytes == 0) return error;
  add_work(stream, &p, sizeof(p));
  std::memset(p, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  const cudaError_t error = enter();
  if (error != cudaSuccess) return error;
  *stream = new CUstream_st;
  add_stream(*stream, flags != cudaStreamNonBlocking);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  remove_stream(stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const cudaError_t error = enter();
  if (error == cudaSuccess) host_waits_for(stream);
  return error;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const cudaError_t error = enter();
  if (error == cudaSuccess) wait_for(stream, event->progress);
  return error;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  const cudaError_t error = enter();
  if (error == cudaSuccess) *event = new CUevent_st;
  return error;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const cudaError_t error = enter();
  if (error == cudaSuccess) event->progress = progress_of(stream);
  return error;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
