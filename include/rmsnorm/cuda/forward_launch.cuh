// Forward and the mean square: from checked parameters to a kernel and its arguments.
#pragma once

#include "../cuda.cuh"
#include "launch.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

template <class Elements>
cudaError_t launch_kernel(Kernel<typename Elements::Params> kernel, const RowShape& shape,
                          const typename Elements::Params& p, std::size_t shared_bytes,
                          const Launch& launch) {
  const std::int64_t blocks = (p.rows + shape.rows_per_block - 1) / shape.rows_per_block;
  return launch_blocks(kernel, shape, blocks, p, shared_bytes, launch);
}

template <class Elements, int at_once>
cudaError_t launch_reading_again(const RowShape& shape, const typename Elements::Params& p,
                                 const Launch& launch) {
  using Params = typename Elements::Params;
  static SharedMemoryLimit limit;
  const Kernel<Params> kernel = forward_reading_again<Elements, at_once>;
  return launch_staging<Elements>(
      kernel, limit, shape, p, launch, [&](const Params& with, std::size_t shared_bytes) {
        return launch_kernel<Elements>(kernel, shape, with, shared_bytes, launch);
      });
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

inline DType dtype_normalised(const ForwardParams& p) {
  if (p.residual_out.present()) return p.residual_out.dtype;
  return p.residual.present() ? promote(p.x.dtype, p.residual.dtype) : p.x.dtype;
}

template <class C>
AnyParams<C> any_params(const ForwardParams& p, const RowLayout& layout, int width,
                        const RowShape& shape, const LaunchOptions& options) {
  AnyParams<C> a = {};
  set_rows(&a, layout, width);
  a.counted = statistic_count(a.n, p.partial);
  a.statistics = make_statistic_options<C>(a.counted, p.eps);
  a.weight_offset = added_offset<C>(p.weight_offset);
  a.normalised_dtype = dtype_normalised(p);
  a.sums_plainly = is_16_bit(a.normalised_dtype) && is_16_bit(p.y.dtype) && shape.vectors != 0;
  a.rounds_sum = p.residual.present() && p.round_residual;
  a.round_before_weight = p.rounding != Rounding::once;
  a.round_rstd = p.rounding == Rounding::rstd;
  a.weight_is_constant = options.constant_weight;
  const DType weight = p.weight_offset != 0.0 ? dtype_of<C>::value : p.weight.dtype;
  a.product_dtype = p.weight.present() ? promote(a.normalised_dtype, weight) : a.normalised_dtype;
  a.biased_dtype = p.bias.present() ? promote(a.product_dtype, p.bias.dtype) : a.product_dtype;
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
  return rows_are_packed(layout, width,
                         {role_x, role_residual, role_weight, role_y, role_residual_out}) &&
         is_aligned_per_row(layout, role_rstd);
}

template <class C>
PackedParams<C> packed_params(const ForwardParams& p, const RowLayout& layout, int width,
                              const LaunchOptions& options) {
  PackedParams<C> a = {};
  set_rows(&a, layout, width);
  a.statistics = make_statistic_options<C>(layout.n(), p.eps);
  a.weight_offset = added_offset<C>(p.weight_offset);
  a.round_before_weight = p.rounding != Rounding::once;
  a.round_rstd = p.rounding == Rounding::rstd;
  a.weight_is_constant = options.constant_weight;
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

}  // namespace detail

RMSNORM_INLINE Status forward(const ForwardParams& p, cudaStream_t stream,
                              const LaunchOptions& options) noexcept {
  const Status status = check(p);
  if (!status.ok()) return status;
  const rmsnorm::detail::RowLayout layout = detail::layout_of(p);
  // Rows without elements: nothing but rstd would be written.
  if (layout.rows() == 0 || (layout.n() == 0 && !p.rstd.present())) return {};
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
  if (layout.rows() == 0) return {};
  return detail::run_operation(p, layout, stream, options, detail::launch_mean_square);
}

}  // namespace cuda
}  // namespace rmsnorm
