// From checked parameters to a launch: which kernel, its arguments, its grid.
#pragma once

#include <atomic>
#include <mutex>

#include "../check.hpp"
#include "../cuda.cuh"
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

// Makes a device current for its own lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ != cudaSuccess || device == current_device || device == previous_) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  cudaError_t error() const { return error_; }
  int device(int asked) const { return asked == current_device ? previous_ : asked; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// ---- what is asked of a device once ----

constexpr int max_devices = 64;

template <class Elements>
using Kernel = void (*)(typename Elements::Params);

inline cudaError_t query_architecture(int device, Architecture* a) {
  cudaFuncAttributes code;
  // The version of the code that the driver chose decides what the kernels can do: a device that
  // runs code made for an older one has no clusters.
  cudaError_t error = cudaFuncGetAttributes(
      &code, reinterpret_cast<const void*>(static_cast<Kernel<AnyElements<float, 4>>>(
                 forward_reading_again<AnyElements<float, 4>, 1>)));
  if (error != cudaSuccess) return error;
  a->version = code.ptxVersion;
  error = cudaDeviceGetAttribute(&a->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  int bytes = 0;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  a->max_shared_memory = static_cast<std::size_t>(bytes);
  return error;
}

// Of the current device.
inline cudaError_t architecture_of(int device, Architecture* a) {
  struct Entry {
    std::atomic<bool> known{false};
    std::mutex mutex;
    Architecture architecture = {};
  };
  static Entry entries[max_devices];
  if (device >= max_devices) return query_architecture(device, a);
  Entry& entry = entries[device];
  if (!entry.known.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(entry.mutex);
    if (!entry.known.load(std::memory_order_relaxed)) {
      // An error is not kept: it may be one of the moment.
      const cudaError_t error = query_architecture(device, &entry.architecture);
      if (error != cudaSuccess) return error;
      entry.known.store(true, std::memory_order_release);
    }
  }
  *a = entry.architecture;
  return cudaSuccess;
}

// ---- launch ----

struct Launch {
  cudaStream_t stream;
  LaunchOptions options;
  int device;
  Architecture architecture;
};

template <class Elements>
cudaError_t launch_kernel(Kernel<Elements> kernel, const RowShape& shape,
                          const typename Elements::Params& p, std::size_t shared_bytes,
                          const Launch& launch) {
  // Blocks of rows beyond what one dimension of a grid holds go on in its third.
  constexpr std::int64_t most_blocks = 0x7fffffff;
  const std::int64_t blocks = (p.rows + shape.rows_per_block - 1) / shape.rows_per_block;
  const std::int64_t layers = (blocks + most_blocks - 1) / most_blocks;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks),
                        static_cast<unsigned>(shape.cluster), static_cast<unsigned>(layers));
  config.blockDim =
      dim3(static_cast<unsigned>(shape.threads), static_cast<unsigned>(shape.rows_per_block));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = launch.stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  config.numAttrs = 0;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = 1;
    a.val.clusterDim.y = static_cast<unsigned>(shape.cluster);
    a.val.clusterDim.z = 1;
  }
  if (launch.options.programmatic && launch.architecture.version >= first_version_with_clusters) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, p);
}

// Rows that are not held in registers are staged in shared memory where they fit.
template <class Elements, int at_once>
cudaError_t launch_reading_again(const RowShape& shape, typename Elements::Params p,
                                 const Launch& launch) {
  const Kernel<Elements> kernel = forward_reading_again<Elements, at_once>;
  std::size_t bytes = reduction_bytes(shape.threads, shape.cluster);
  if (shape.vectors == 0) {
    const std::int64_t team = std::int64_t{shape.threads} * shape.cluster;
    const std::int64_t chunks = (p.vectors + team - 1) / team * shape.threads;
    const std::int64_t staged =
        static_cast<std::int64_t>(bytes) +
        chunks * static_cast<std::int64_t>(sizeof(typename Elements::Chunk));
    p.staged = staged <= static_cast<std::int64_t>(launch.architecture.max_shared_memory);
    if (p.staged) {
      bytes = static_cast<std::size_t>(staged);
      // A property of the kernel in the current context. Only rows of more than 32 KiB come here.
      const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
      if (error != cudaSuccess) return error;
    }
  }
  return launch_kernel<Elements>(kernel, shape, p, bytes, launch);
}

template <class Elements>
cudaError_t launch_packed(const RowShape& shape, const typename Elements::Params& p,
                          const Launch& launch) {
  const std::size_t bytes = reduction_bytes(shape.threads, shape.cluster);
  switch (shape.vectors) {
    case 1:
      return launch_kernel<Elements>(forward_in_registers<Elements, 1>, shape, p, bytes, launch);
    case 2:
      return launch_kernel<Elements>(forward_in_registers<Elements, 2>, shape, p, bytes, launch);
    case 4:
      return launch_kernel<Elements>(forward_in_registers<Elements, 4>, shape, p, bytes, launch);
    default: return launch_reading_again<Elements, 4>(shape, p, launch);
  }
}

// ---- arguments ----

// The layout of an operation's tensors; absent ones stay absent.
inline RowLayout layout_of(const ForwardParams& p) {
  RowLayout layout(p.x, p.axis);
  layout.add(role_x, p.x);
  layout.add(role_residual, p.residual);
  layout.add(role_weight, p.weight);
  layout.add(role_bias, p.bias);
  layout.add(role_y, p.y);
  layout.add(role_residual_out, p.residual_out);
  layout.add_per_row(role_mean_square, p.mean_square);
  layout.add_per_row(role_rstd, p.rstd);
  layout.merge_rows();
  return layout;
}

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

inline std::int64_t row_count(const RowLayout& layout) {
  std::int64_t rows = 1;
  for (int d = 0; d < layout.row_rank(); ++d) rows *= layout.row_size(d);
  return rows;
}

inline DType dtype_normalised(const ForwardParams& p) {
  if (p.residual_out.present()) return p.residual_out.dtype;
  return p.residual.present() ? promote(p.x.dtype, p.residual.dtype) : p.x.dtype;
}

inline std::int64_t vectors_of(const RowLayout& layout, int width) {
  return (layout.n() + width - 1) / width;
}

template <class C>
AnyParams<C> any_params(const ForwardParams& p, const RowLayout& layout, int width,
                        const RowShape& shape, const LaunchOptions& options) {
  AnyParams<C> a = {};
  a.rows = row_count(layout);
  a.n = layout.n();
  a.vectors = vectors_of(layout, width);
  a.counted = statistic_count(a.n, p.partial);
  a.statistics = make_statistic_options<C>(a.counted, p.eps);
  // Adding -0.0 changes no weight; adding +0.0 would turn -0.0 into +0.0.
  a.weight_offset = static_cast<C>(p.weight_offset != 0.0 ? p.weight_offset : -0.0);
  a.normalised_dtype = dtype_normalised(p);
  a.sums_plainly = is_16_bit(a.normalised_dtype) && is_16_bit(p.y.dtype) && shape.vectors != 0;
  a.rounds_sum = p.residual.present() && p.round_residual;
  a.round_before_weight = p.rounding != Rounding::once;
  a.round_rstd = p.rounding == Rounding::rstd;
  a.weight_is_constant = options.constant_weight;
  const DType weight = p.weight_offset != 0.0 ? dtype_of<C>::value : p.weight.dtype;
  a.product_dtype = p.weight.present() ? promote(a.normalised_dtype, weight) : a.normalised_dtype;
  a.biased_dtype = p.bias.present() ? promote(a.product_dtype, p.bias.dtype) : a.product_dtype;
  a.row_rank = layout.row_rank();
  a.inner_rank = layout.inner_rank();
  for (int d = 0; d < a.row_rank; ++d) a.row_sizes[d] = layout.row_size(d);
  for (int d = 0; d < a.inner_rank; ++d) a.inner_sizes[d] = layout.inner_size(d);
  set_operand(&a.x, layout, role_x, width);
  set_operand(&a.residual, layout, role_residual, width);
  set_operand(&a.weight, layout, role_weight, width);
  set_operand(&a.bias, layout, role_bias, width);
  set_operand(&a.y, layout, role_y, width);
  set_operand(&a.residual_out, layout, role_residual_out, width);
  set_operand(&a.mean_square, layout, role_mean_square);
  set_operand(&a.rstd, layout, role_rstd);
  return a;
}

// Whether PackedElements can do it: see there.
inline bool is_packed(const ForwardParams& p, const RowLayout& layout, int width) {
  const DType t = p.x.dtype;
  if (compute_type(p) != (t == DType::f64 ? DType::f64 : DType::f32) || p.y.dtype != t)
    return false;
  if (p.bias.present() || p.mean_square.present() || p.partial != 1.0) return false;
  if (p.residual.present() &&
      (p.residual.dtype != t || (is_16_bit(t) && !p.round_residual) || dtype_normalised(p) != t)) {
    return false;
  }
  if (p.weight.present() && p.weight.dtype != t &&
      !(is_16_bit(t) && p.weight.dtype == DType::f32)) {
    return false;
  }
  if (layout.n() == 0 || layout.n() % width != 0) return false;
  constexpr std::int64_t divisible = std::int64_t{1} << 31;
  if (row_count(layout) >= divisible) return false;
  for (const Role role : {role_x, role_residual, role_weight, role_y, role_residual_out}) {
    const Operand& o = layout.operand(role);
    if (o.present && !(o.unit && is_multiple(o, layout.row_rank(), 16))) return false;
  }
  const Operand& rstd = layout.operand(role_rstd);
  return !rstd.present || is_multiple(rstd, layout.row_rank(), size_in_bytes(rstd.dtype));
}

template <class C>
PackedParams<C> packed_params(const ForwardParams& p, const RowLayout& layout, int width,
                              const LaunchOptions& options) {
  PackedParams<C> a = {};
  a.rows = row_count(layout);
  a.vectors = vectors_of(layout, width);
  a.statistics = make_statistic_options<C>(layout.n(), p.eps);
  a.weight_offset = static_cast<C>(p.weight_offset != 0.0 ? p.weight_offset : -0.0);
  a.round_before_weight = p.rounding != Rounding::once;
  a.round_rstd = p.rounding == Rounding::rstd;
  a.weight_is_constant = options.constant_weight;
  a.row_rank = layout.row_rank() > 0 ? layout.row_rank() : 1;
  for (int d = 0; d < layout.row_rank(); ++d) {
    a.row_dimensions[d] = make_row_dimension(layout.row_size(d));
  }
  const int rank = layout.row_rank();
  set_rows(&a.x, layout.operand(role_x), rank);
  set_rows(&a.residual, layout.operand(role_residual), rank);
  set_rows(&a.weight, layout.operand(role_weight), rank);
  set_rows(&a.y, layout.operand(role_y), rank);
  set_rows(&a.residual_out, layout.operand(role_residual_out), rank);
  set_rows(&a.rstd, layout.operand(role_rstd), rank);
  return a;
}

// ---- which kernel ----

template <class T, class W>
cudaError_t launch_weighted(const ForwardParams& p, const RowLayout& layout, const RowShape& shape,
                            const Launch& launch) {
  using C = typename PackedElements<T, W, false>::Compute;
  constexpr int width = PackedElements<T, W, false>::width;
  const PackedParams<C> a = packed_params<C>(p, layout, width, launch.options);
  return p.residual.present() ? launch_packed<PackedElements<T, W, true>>(shape, a, launch)
                              : launch_packed<PackedElements<T, W, false>>(shape, a, launch);
}

inline cudaError_t launch_packed_of(const ForwardParams& p, const RowLayout& layout,
                                    const RowShape& shape, const Launch& launch) {
  const bool wide_weight = p.weight.present() && p.weight.dtype != p.x.dtype;
  switch (p.x.dtype) {
    case DType::f16:
      return wide_weight ? launch_weighted<float16, float>(p, layout, shape, launch)
                         : launch_weighted<float16, float16>(p, layout, shape, launch);
    case DType::bf16:
      return wide_weight ? launch_weighted<bfloat16, float>(p, layout, shape, launch)
                         : launch_weighted<bfloat16, bfloat16>(p, layout, shape, launch);
    case DType::f32: return launch_weighted<float, float>(p, layout, shape, launch);
    default: return launch_weighted<double, double>(p, layout, shape, launch);
  }
}

inline cudaError_t launch_forward(const ForwardParams& p, const RowLayout& layout,
                                  const Launch& launch) {
  const DType compute = compute_type(p);
  const int width = elements_at_once(p.x.dtype, compute);
  const RowShape shape = row_shape(vectors_of(layout, width), launch.architecture.version);
  if (is_packed(p, layout, width)) return launch_packed_of(p, layout, shape, launch);
  if (compute == DType::f64) {
    return launch_reading_again<AnyElements<double, 2>, 1>(
        shape, any_params<double>(p, layout, width, shape, launch.options), launch);
  }
  const AnyParams<float> a = any_params<float>(p, layout, width, shape, launch.options);
  return width == 8 ? launch_reading_again<AnyElements<float, 8>, 1>(shape, a, launch)
                    : launch_reading_again<AnyElements<float, 4>, 1>(shape, a, launch);
}

template <class C>
AnyParams<C> mean_square_params(const MeanSquareParams& p, const RowLayout& layout, int width,
                                const RowShape& shape) {
  ForwardParams like;
  like.x = p.x;
  like.partial = p.partial;
  like.eps = 0.0;
  AnyParams<C> a = any_params<C>(like, layout, width, shape, LaunchOptions());
  a.mean_square_is_output = true;
  a.sums_plainly = false;
  return a;
}

inline cudaError_t launch_mean_square(const MeanSquareParams& p, const RowLayout& layout,
                                      const Launch& launch) {
  const int width = elements_at_once(p.x.dtype, p.x.dtype);
  const RowShape shape = row_shape(vectors_of(layout, width), launch.architecture.version);
  if (p.x.dtype == DType::f64) {
    return launch_reading_again<AnyElements<double, 2>, 1>(
        shape, mean_square_params<double>(p, layout, width, shape), launch);
  }
  const AnyParams<float> a = mean_square_params<float>(p, layout, width, shape);
  return width == 8 ? launch_reading_again<AnyElements<float, 8>, 1>(shape, a, launch)
                    : launch_reading_again<AnyElements<float, 4>, 1>(shape, a, launch);
}

// What every operation does around its launch.
template <class Params, class LaunchOperation>
Status run_operation(const Params& p, const RowLayout& layout, cudaStream_t stream,
                     const LaunchOptions& options, LaunchOperation operation) {
  if (row_count(layout) == 0) return {};
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

}  // namespace detail

#if !defined(RMSNORM_INLINE)
#define RMSNORM_INLINE inline
#endif

RMSNORM_INLINE Status forward(const ForwardParams& p, cudaStream_t stream,
                              const LaunchOptions& options) noexcept {
  const Status status = check(p);
  if (!status.ok()) return status;
  const rmsnorm::detail::RowLayout layout = detail::layout_of(p);
  // Rows without elements: nothing but rstd would be written.
  if (layout.n() == 0 && !p.rstd.present()) return {};
  return detail::run_operation(p, layout, stream, options, detail::launch_forward);
}

RMSNORM_INLINE Status mean_square(const MeanSquareParams& p, cudaStream_t stream,
                                  const LaunchOptions& options) noexcept {
  const Status status = check(p);
  if (!status.ok()) return status;
  rmsnorm::detail::RowLayout layout(p.x, p.axis);
  layout.add(rmsnorm::detail::role_x, p.x);
  layout.add_per_row(rmsnorm::detail::role_mean_square, p.mean_square);
  layout.merge_rows();
  return detail::run_operation(p, layout, stream, options, detail::launch_mean_square);
}

RMSNORM_INLINE const char* error_text(const Status& status) noexcept {
  return status.code == Code::cuda_error
             ? cudaGetErrorString(static_cast<cudaError_t>(status.cuda_error))
             : text(status.code);
}

}  // namespace cuda
}  // namespace rmsnorm
