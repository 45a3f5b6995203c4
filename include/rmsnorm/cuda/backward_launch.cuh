// Backward: from checked parameters to its two kernels and their arguments.
#pragma once

#include "../cuda.cuh"
#include "../gradient_blocks.hpp"
#include "backward.cuh"
#include "launch.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

inline int gradient_width(const BackwardParams& p) {
  return elements_at_once(p.x.dtype, compute_type(p));
}

inline GradientBlocks gradient_blocks(const BackwardParams& p, const RowLayout& layout) {
  const std::int64_t vectors = vectors_of(layout, gradient_width(p));
  return rmsnorm::detail::gradient_blocks(
      layout, [&](std::int64_t) { return gradient_rows_per_block(layout.rows(), vectors); });
}

inline bool has_sums(const BackwardParams& p) { return p.dweight.present() || p.dbias.present(); }

// ---- kernels ----

// Sums of several teams meet in shared memory.
template <class Elements>
std::size_t team_sums_bytes(const RowShape& shape, const typename Elements::Params& p) {
  const std::int64_t columns = p.vectors * Elements::width;
  const std::size_t bytes =
      team_sum_bytes<typename Elements::Compute>(shape.rows_per_block, columns);
  return (p.sums.dweight != nullptr ? bytes : 0) + (p.sums.dbias != nullptr ? bytes : 0);
}

template <class Elements>
cudaError_t launch_gradients(Kernel<typename Elements::Params> kernel, const RowShape& shape,
                             const typename Elements::Params& p, std::size_t shared_bytes,
                             const Launch& launch) {
  return launch_blocks(kernel, shape, p.blocks.count(), p,
                       shared_bytes + team_sums_bytes<Elements>(shape, p), launch);
}

template <class Elements>
cudaError_t launch_gradients_reading_again(const RowShape& shape,
                                           const typename Elements::Params& p,
                                           const Launch& launch) {
  using Params = typename Elements::Params;
  static SharedMemoryLimit limit;
  const Kernel<Params> kernel = backward_reading_again<Elements>;
  return launch_staging<Elements>(
      kernel, limit, shape, p, launch, [&](const Params& with, std::size_t shared_bytes) {
        return launch_gradients<Elements>(kernel, shape, with, shared_bytes, launch);
      });
}

template <class Elements>
cudaError_t launch_packed_gradients(const RowShape& shape, const typename Elements::Params& p,
                                    const Launch& launch) {
  const std::size_t bytes = reduction_bytes(shape.threads, shape.cluster);
  switch (shape.vectors) {
    case 1:
      return launch_gradients<Elements>(backward_in_registers<Elements, 1>, shape, p, bytes,
                                        launch);
    case 2:
      return launch_gradients<Elements>(backward_in_registers<Elements, 2>, shape, p, bytes,
                                        launch);
    default: return launch_gradients_reading_again<Elements>(shape, p, launch);
  }
}

// ---- arguments ----

template <class C>
void set_gradient_params(GradientParams<C>* a, const BackwardParams& p, const RowLayout& layout,
                         const LaunchOptions& options) {
  a->statistics = make_statistic_options<C>(statistic_count(layout.n(), p.partial), p.eps);
  a->weight_offset = added_offset<C>(p.weight_offset);
  a->weight_is_constant = options.constant_weight;
  a->blocks = gradient_blocks(p, layout);
  const GradientSums sums(p, layout.n());
  a->sums.block_stride = sums.rows * sums.stride;
  if (p.dweight.present()) a->sums.dweight = sums.row(p.workspace, 0, false);
  if (p.dbias.present()) a->sums.dbias = sums.row(p.workspace, 0, p.dweight.present());
}

template <class C>
AnyGradientParams<C> any_gradient_params(const BackwardParams& p, const RowLayout& layout,
                                         const RowShape& shape, const LaunchOptions& options) {
  AnyGradientParams<C> a = {};
  const int width = gradient_width(p);
  set_rows(static_cast<AnyRows*>(&a), layout, width);
  set_gradient_params<C>(&a, p, layout, options);
  a.counted = statistic_count(a.n, p.partial);
  a.rstd_depends_on = p.mean_square.present() ? 0 : a.counted;
  a.sums_plainly =
      is_16_bit(p.dy.dtype) && is_16_bit(p.x.dtype) && is_16_bit(p.dx.dtype) && shape.vectors != 0;
  set_operand(&a.dy, layout, role_dy, width);
  set_operand(&a.x, layout, role_x, width);
  set_operand(&a.residual, layout, role_residual, width);
  set_operand(&a.weight, layout, role_weight, width);
  set_operand(&a.d_residual, layout, role_d_residual, width);
  set_operand(&a.dx, layout, role_dx, width);
  set_operand(&a.rstd, layout, role_rstd);
  set_operand(&a.mean_square, layout, role_mean_square);
  set_operand(&a.d_mean_square, layout, role_d_mean_square);
  return a;
}

// Whether PackedGradients can do it: see there.
inline bool is_packed(const BackwardParams& p, const RowLayout& layout) {
  const DType t = p.x.dtype, compute = compute_type(p);
  if (compute != (t == DType::f64 ? DType::f64 : DType::f32)) return false;
  if (p.dy.dtype != t || p.dx.dtype != t) return false;
  if (p.d_residual.present() && p.d_residual.dtype != t) return false;
  if (p.residual.present() || p.mean_square.present() || p.dbias.present() || p.partial != 1.0) {
    return false;
  }
  if (p.weight.present() && p.weight.dtype != t &&
      !(is_16_bit(t) && p.weight.dtype == DType::f32)) {
    return false;
  }
  if (p.rstd.present() && p.rstd.dtype != compute) return false;
  return rows_are_packed(layout, gradient_width(p),
                         {role_dy, role_x, role_weight, role_d_residual, role_dx}) &&
         is_aligned_per_row(layout, role_rstd);
}

template <class C>
PackedGradientParams<C> packed_gradient_params(const BackwardParams& p, const RowLayout& layout,
                                               const LaunchOptions& options) {
  PackedGradientParams<C> a = {};
  set_rows(static_cast<PackedRows*>(&a), layout, gradient_width(p));
  set_gradient_params<C>(&a, p, layout, options);
  const int rank = layout.row_rank();
  set_rows(&a.dy, layout.operand(role_dy), rank);
  set_rows(&a.x, layout.operand(role_x), rank);
  set_rows(&a.weight, layout.operand(role_weight), rank);
  set_rows(&a.rstd, layout.operand(role_rstd), rank);
  set_rows(&a.d_residual, layout.operand(role_d_residual), rank);
  set_rows(&a.dx, layout.operand(role_dx), rank);
  return a;
}

// Of the dimensions that tell groups apart, those over which the output varies, or the others.
inline GroupDimensions group_dimensions(const RowLayout& layout, const GradientBlocks& blocks,
                                        const Operand& out, bool varying) {
  GroupDimensions g = {};
  g.count = 1;
  std::int64_t step = blocks.groups;
  for (int d = 0; d < blocks.group_rank; ++d) {
    // With a dimension of size 0 there are no groups, and no step is taken.
    if (layout.row_size(d) != 0) step /= layout.row_size(d);
    if ((out.row_strides[d] != 0) != varying) continue;
    g.count = saturated_product(g.count, layout.row_size(d));
    g.sizes[g.rank] = layout.row_size(d);
    g.steps[g.rank] = step;
    g.strides[g.rank] = out.row_strides[d];
    ++g.rank;
  }
  return g;
}

inline void set_output(SummedOutput* to, const BackwardParams& p, const RowLayout& layout,
                       const GradientBlocks& blocks, Role role, const char* sums) {
  const Operand& o = layout.operand(role);
  to->sums = sums;
  to->rows = group_dimensions(layout, blocks, o, true);
  to->shared = group_dimensions(layout, blocks, o, false);
  if (blocks.count() == 0) to->shared.count = 0;
  set_operand(&to->out, layout, role, gradient_width(p));
}

// ---- which kernel ----

template <class T, class W>
cudaError_t launch_weighted_gradients(const BackwardParams& p, const RowLayout& layout,
                                      const RowShape& shape, const Launch& launch) {
  using C = typename PackedGradients<T, W, false>::Compute;
  const PackedGradientParams<C> a = packed_gradient_params<C>(p, layout, launch.options);
  return p.d_residual.present()
             ? launch_packed_gradients<PackedGradients<T, W, true>>(shape, a, launch)
             : launch_packed_gradients<PackedGradients<T, W, false>>(shape, a, launch);
}

inline cudaError_t launch_packed_gradients_of(const BackwardParams& p, const RowLayout& layout,
                                              const RowShape& shape, const Launch& launch) {
  const bool wide_weight = p.weight.present() && p.weight.dtype != p.x.dtype;
  switch (p.x.dtype) {
    case DType::f16:
      return wide_weight ? launch_weighted_gradients<float16, float>(p, layout, shape, launch)
                         : launch_weighted_gradients<float16, float16>(p, layout, shape, launch);
    case DType::bf16:
      return wide_weight ? launch_weighted_gradients<bfloat16, float>(p, layout, shape, launch)
                         : launch_weighted_gradients<bfloat16, bfloat16>(p, layout, shape, launch);
    case DType::f32: return launch_weighted_gradients<float, float>(p, layout, shape, launch);
    default: return launch_weighted_gradients<double, double>(p, layout, shape, launch);
  }
}

inline cudaError_t launch_rows(const BackwardParams& p, const RowLayout& layout,
                               const Launch& launch) {
  const int width = gradient_width(p);
  const RowShape shape = gradient_shape(vectors_of(layout, width), launch.architecture.version);
  if (is_packed(p, layout)) return launch_packed_gradients_of(p, layout, shape, launch);
  if (compute_type(p) == DType::f64) {
    return launch_gradients_reading_again<AnyGradients<double, 2>>(
        shape, any_gradient_params<double>(p, layout, shape, launch.options), launch);
  }
  const AnyGradientParams<float> a = any_gradient_params<float>(p, layout, shape, launch.options);
  return width == 8 ? launch_gradients_reading_again<AnyGradients<float, 8>>(shape, a, launch)
                    : launch_gradients_reading_again<AnyGradients<float, 4>>(shape, a, launch);
}

template <class C>
cudaError_t launch_sums(const BackwardParams& p, const RowLayout& layout, const Launch& launch) {
  GradientParams<C> like = {};
  set_gradient_params<C>(&like, p, layout, launch.options);
  SumBlocksParams a = {};
  set_rows(&a.shape, layout, gradient_width(p));
  a.blocks_per_group = like.blocks.blocks_per_group;
  a.block_stride = like.sums.block_stride;
  a.tiles = quotient_rounded_up(layout.n(), tile_columns);
  int outputs = 0;
  // Without data: no elements to write.
  if (layout.operand(role_dweight).present && layout.operand(role_dweight).data != nullptr) {
    set_output(&a.outputs[outputs++], p, layout, like.blocks, role_dweight, like.sums.dweight);
  }
  if (layout.operand(role_dbias).present && layout.operand(role_dbias).data != nullptr) {
    set_output(&a.outputs[outputs++], p, layout, like.blocks, role_dbias, like.sums.dbias);
  }
  std::int64_t rows = 0;
  for (const SummedOutput& o : a.outputs) rows = o.rows.count > rows ? o.rows.count : rows;
  if (rows * a.tiles == 0) return cudaSuccess;
  int threads = 1;  // for a column
  while (threads < most_tile_threads && threads < a.blocks_per_group) threads *= 2;
  const std::size_t bytes = static_cast<std::size_t>(threads) * tile_columns * sizeof(double);
  return launch_grid(sum_blocks<C>, grid_of(rows * a.tiles, outputs),
                     dim3(tile_columns, static_cast<unsigned>(threads)), 1, a, bytes, launch);
}

inline std::int64_t workspace_bytes(const BackwardParams& p, const RowLayout& layout) {
  return GradientSums(p, layout.n()).bytes(gradient_blocks(p, layout).count());
}

inline cudaError_t launch_backward(const BackwardParams& p, const RowLayout& layout,
                                   const Launch& launch) {
  cudaError_t error = cudaSuccess;
  if (layout.rows() != 0) error = launch_rows(p, layout, launch);
  if (error != cudaSuccess || !has_sums(p)) return error;
  return compute_type(p) == DType::f64 ? launch_sums<double>(p, layout, launch)
                                       : launch_sums<float>(p, layout, launch);
}

}  // namespace detail

RMSNORM_INLINE std::int64_t backward_workspace(const BackwardParams& p) noexcept {
  return check(p).ok() ? detail::workspace_bytes(p, rmsnorm::detail::layout_of(p)) : 0;
}

RMSNORM_INLINE Status backward(const BackwardParams& p, cudaStream_t stream,
                               const LaunchOptions& options) noexcept {
  rmsnorm::detail::TensorList<BackwardParams> tensors;
  Status status = rmsnorm::detail::check(p, tensors);
  if (!status.ok()) return status;
  const rmsnorm::detail::RowLayout layout = rmsnorm::detail::layout_of(p);
  status = rmsnorm::detail::check_workspace(tensors, p.workspace, p.workspace_bytes,
                                            detail::workspace_bytes(p, layout));
  if (!status.ok()) return status;
  const bool has_rows = layout.rows() != 0;
  // Rows without elements have no gradient but that of their mean square.
  if (layout.n() == 0 ? !has_rows || !p.d_mean_square.present()
                      : !has_rows && !detail::has_sums(p)) {
    return {};
  }
  return detail::run_operation(p, layout, stream, options, detail::launch_backward);
}

}  // namespace cuda
}  // namespace rmsnorm
