// What every operation does around its launch: the device and what it can do, grids, and the
// arguments that describe tensors.
#pragma once

#include <atomic>
#include <initializer_list>

#include "../check.hpp"
#include "../cuda.cuh"
#include "device_guard.cuh"
#include "forward.cuh"
#include "shape.hpp"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

inline Status cuda_failure(cudaError_t error) {
  Status status;
  status.code = Code::cuda_error;
  status.cuda_error = static_cast<std::int32_t>(error);
  return status;
}

// ---- what is asked of a device once ----

constexpr int max_devices = 64;

template <class Params>
using Kernel = void (*)(Params);

inline cudaError_t query_architecture(int device, Architecture* a) {
  cudaFuncAttributes code;
  // The version of the code that the driver chose decides what the kernels can do: a device that
  // runs code made for an older one has no clusters.
  cudaError_t error = cudaFuncGetAttributes(
      &code, reinterpret_cast<const void*>(static_cast<Kernel<AnyParams<float>>>(
                 forward_reading_again<AnyElements<float, 4>, 1>)));
  if (error != cudaSuccess) return error;
  a->version = code.ptxVersion;
  return cudaDeviceGetAttribute(&a->multiprocessors, cudaDevAttrMultiProcessorCount, device);
}

// Of the current device.
inline cudaError_t architecture_of(int device, Architecture* a) {
  static AskedOnce<Architecture> known[max_devices];
  const auto ask = [device](Architecture* asked) { return query_architecture(device, asked); };
  return device < max_devices ? known[device].get(a, ask) : ask(a);
}

// The shared memory that launches of one kernel may ask for, on each device.
//
// How much of it is a property of the kernel in a context, which all host threads share: were it
// set to what a launch needs, it could be less again when the launch comes. It is set to the most
// that a block can have, always, so that it does not matter who sets it last.
class SharedMemoryLimit {
 public:
  // Of the current device, whose number is given. The kernel is always the same one.
  cudaError_t get(const void* kernel, int device, int* bytes) {
    if (device < max_devices) *bytes = known_[device].load(std::memory_order_acquire);
    return device < max_devices && *bytes != 0 ? cudaSuccess : raise(kernel, device, bytes);
  }
  cudaError_t raise(const void* kernel, int device, int* bytes) {
    cudaFuncAttributes code;
    cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    *bytes -= static_cast<int>(code.sharedSizeBytes);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, *bytes);
    if (error == cudaSuccess && device < max_devices) {
      known_[device].store(*bytes, std::memory_order_release);
    }
    return error;
  }

 private:
  std::atomic<int> known_[max_devices] = {};
};

// ---- launch ----

struct Launch {
  cudaStream_t stream;
  LaunchOptions options;
  int device;
  Architecture architecture;
};

// Blocks beyond what one dimension of a grid holds go on in its third.
inline dim3 grid_of(std::int64_t blocks, int of_each) {
  constexpr std::int64_t most_blocks = 0x7fffffff;
  const std::int64_t layers = (blocks + most_blocks - 1) / most_blocks;
  return dim3(static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks),
              static_cast<unsigned>(of_each), static_cast<unsigned>(layers));
}

template <class Params>
cudaError_t launch_grid(Kernel<Params> kernel, dim3 grid, dim3 block, int cluster, const Params& p,
                        std::size_t shared_bytes, const Launch& launch) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = launch.stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  config.numAttrs = 0;
  if (cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = 1;
    a.val.clusterDim.y = static_cast<unsigned>(cluster);
    a.val.clusterDim.z = 1;
  }
  if (launch.options.programmatic && launch.architecture.version >= first_version_with_clusters) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, p);
}

// `blocks` blocks of rows, of shape.cluster blocks of threads each.
template <class Params>
cudaError_t launch_blocks(Kernel<Params> kernel, const RowShape& shape, std::int64_t blocks,
                          const Params& p, std::size_t shared_bytes, const Launch& launch) {
  return launch_grid(
      kernel, grid_of(blocks, shape.cluster),
      dim3(static_cast<unsigned>(shape.threads), static_cast<unsigned>(shape.rows_per_block)),
      shape.cluster, p, shared_bytes, launch);
}

// Shared memory of a block that stages its part of a row, a Chunk a vector, beside other bytes.
template <class Elements>
std::int64_t staged_bytes(const RowShape& shape, std::int64_t vectors, std::size_t others) {
  const std::int64_t team = std::int64_t{shape.threads} * shape.cluster;
  const std::int64_t chunks = (vectors + team - 1) / team * shape.threads;
  return static_cast<std::int64_t>(others) +
         chunks * static_cast<std::int64_t>(sizeof(typename Elements::Chunk));
}

// A kernel that reads rows again if it does not hold them in registers: they are staged in shared
// memory where they fit. `launch_with(p, shared_bytes)` launches it.
template <class Elements, class LaunchWith>
cudaError_t launch_staging(Kernel<typename Elements::Params> kernel, SharedMemoryLimit& limit,
                           const RowShape& shape, typename Elements::Params p, const Launch& launch,
                           const LaunchWith& launch_with) {
  const std::size_t bytes = reduction_bytes(shape.threads, shape.cluster);
  if (shape.vectors != 0) return launch_with(p, bytes);
  const void* const code = reinterpret_cast<const void*>(kernel);
  int most = 0;
  cudaError_t error = limit.get(code, launch.device, &most);
  if (error != cudaSuccess) return error;
  const std::int64_t staged = staged_bytes<Elements>(shape, p.vectors, bytes);
  p.staged = staged <= most;
  if (!p.staged) return launch_with(p, bytes);
  error = launch_with(p, static_cast<std::size_t>(staged));
  if (error != cudaErrorInvalidValue) return error;
  // Another context than the one whose limit was raised: the device was reset meanwhile, or the
  // program makes contexts itself.
  cudaGetLastError();
  error = limit.raise(code, launch.device, &most);
  return error == cudaSuccess ? launch_with(p, static_cast<std::size_t>(staged)) : error;
}

// What every operation does around its launch.
template <class Params, class LaunchOperation>
Status run_operation(const Params& p, const RowLayout& layout, cudaStream_t stream,
                     const LaunchOptions& options, LaunchOperation operation) {
  const DeviceGuard guard(options.device);
  Launch launch = {stream, options, guard.device(options.device), {}};
  cudaError_t error = guard.error();
  if (error == cudaSuccess) error = architecture_of(launch.device, &launch.architecture);
  if (error == cudaSuccess) error = operation(p, layout, launch);
  if (error == cudaSuccess) return {};
  // Errors stay behind as the last error, where the caller's next check would find them.
  cudaGetLastError();
  return cuda_failure(error);
}

// ---- arguments ----

inline bool is_multiple(const Operand& o, int row_rank, std::int64_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(o.data) % static_cast<std::uintptr_t>(bytes) != 0) {
    return false;
  }
  for (int d = 0; d < row_rank; ++d) {
    if (o.row_strides[d] % bytes != 0) return false;
  }
  return true;
}

template <class To>
void set_rows(To* to, const Operand& o, int row_rank) {
  to->data = o.present ? o.data : nullptr;
  for (int d = 0; d < max_row_rank; ++d) {
    to->row_strides[d] = o.present && d < row_rank ? o.row_strides[d] : 0;
  }
}

inline void set_operand(AnyOperand* to, const RowLayout& layout, Role role, int width) {
  const Operand& o = layout.operand(role);
  set_rows(to, o, layout.row_rank());
  to->present = o.present;
  to->aligned = to->unit = to->vectorized = false;
  if (!o.present) return;
  const std::int64_t size = size_in_bytes(o.dtype), together = size * width;
  to->dtype = o.dtype;
  to->aligned = is_multiple(o, layout.row_rank(), size);
  for (int d = 0; d < layout.inner_rank(); ++d) {
    to->inner_strides[d] = o.inner_strides[d];
    if (o.inner_strides[d] % size != 0) to->aligned = false;
  }
  to->unit = o.unit && to->aligned;
  to->vectorized = o.unit && is_multiple(o, layout.row_rank(), together < 16 ? together : 16);
}
inline void set_operand(RowOperand* to, const RowLayout& layout, Role role) {
  const Operand& o = layout.operand(role);
  set_rows(to, o, layout.row_rank());
  to->present = o.present;
  to->aligned = false;
  if (!o.present) return;
  to->dtype = o.dtype;
  to->aligned = is_multiple(o, layout.row_rank(), size_in_bytes(o.dtype));
}

inline std::int64_t vectors_of(const RowLayout& layout, int width) {
  return quotient_rounded_up(layout.n(), width);
}

// The rows of a layout, as kernels walk them.
inline void set_rows(PackedRows* to, const RowLayout& layout, int width) {
  to->rows = layout.rows();
  to->vectors = vectors_of(layout, width);
  to->row_rank = layout.row_rank() > 0 ? layout.row_rank() : 1;
  for (int d = 0; d < layout.row_rank(); ++d) {
    to->row_dimensions[d] = make_row_dimension(layout.row_size(d));
  }
}
inline void set_rows(AnyRows* to, const RowLayout& layout, int width) {
  to->rows = layout.rows();
  to->vectors = vectors_of(layout, width);
  to->n = layout.n();
  to->row_rank = layout.row_rank();
  to->inner_rank = layout.inner_rank();
  for (int d = 0; d < to->row_rank; ++d) to->row_sizes[d] = layout.row_size(d);
  for (int d = 0; d < to->inner_rank; ++d) to->inner_sizes[d] = layout.inner_size(d);
}

// What packed kernels ask of rows, whatever the operation.
inline bool rows_are_packed(const RowLayout& layout, int width, std::initializer_list<Role> roles) {
  if (layout.n() == 0 || layout.n() % width != 0) return false;
  constexpr std::int64_t divisible = std::int64_t{1} << 31;
  if (layout.rows() >= divisible) return false;
  for (const Role role : roles) {
    const Operand& o = layout.operand(role);
    if (o.present && !(o.unit && is_multiple(o, layout.row_rank(), 16))) return false;
  }
  return true;
}
inline bool is_aligned_per_row(const RowLayout& layout, Role role) {
  const Operand& o = layout.operand(role);
  return !o.present || is_multiple(o, layout.row_rank(), size_in_bytes(o.dtype));
}

// Adding -0.0 changes no weight; adding +0.0 would turn -0.0 into +0.0.
template <class C>
C added_offset(double weight_offset) {
  return static_cast<C>(weight_offset != 0.0 ? weight_offset : -0.0);
}

}  // namespace detail

#if !defined(RMSNORM_INLINE)
#define RMSNORM_INLINE inline
#endif

RMSNORM_INLINE const char* error_text(const Status& status) noexcept {
  return status.code == Code::cuda_error
             ? cudaGetErrorString(static_cast<cudaError_t>(status.cuda_error))
             : text(status.code);
}

}  // namespace cuda
}  // namespace rmsnorm
