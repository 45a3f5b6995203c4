// From the public functions to the kernels of an ISA. Every header with target regions is included
// here and only here, after all standard headers that it needs.
#pragma once

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "-ffast-math and its parts break exact rounding: compile without, or link rmsnorm::rmsnorm"
#endif

#include "../rmsnorm.hpp"
#include "backward.hpp"
#include "call_layout.hpp"
#include "float_environment.hpp"
#include "forward.hpp"
#include "scalar.hpp"
#include "statistics.hpp"
#if defined(RMSNORM_X86_64)
#include "avx2.hpp"
#include "avx512.hpp"
#if defined(RMSNORM_HAS_AVX512_BF16)
#include "avx512_bf16.hpp"
#endif
#elif defined(RMSNORM_AARCH64)
#include "neon.hpp"
#endif

// Inline where the header library is included, ordinary functions where src/ compiles them.
#if !defined(RMSNORM_INLINE)
#define RMSNORM_INLINE inline
#endif

namespace rmsnorm {
namespace cpu {
namespace detail {

#if defined(RMSNORM_X86_64)
inline const KernelTable& avx512_bf16_kernels() {
#if defined(RMSNORM_HAS_AVX512_BF16)
  static const KernelTable table = avx512_bf16::with_own_bf16(avx512::kernel_table());
  return table;
#else
  return avx512::kernel_table();
#endif
}

// For CPUs that halve 512 bits: conversions of float from and to f16 and double take two to four
// times as long there as in AVX2, and what gains is bf16.
inline KernelTable avx2_but_for_bf16(const KernelTable& wide) {
  KernelTable table = avx2::kernel_table();
  take_kernels(wide, DType::bf16, &table);
  return table;
}

// For those who asked for no ISA, of which the widest was chosen for all calls of the process.
inline const KernelTable& fastest_kernels(Isa widest) {
  static const KernelTable table = [widest] {
    const KernelTable& wide =
        widest == Isa::avx512_bf16 ? avx512_bf16_kernels() : avx512::kernel_table();
    return halves_512_bits() ? avx2_but_for_bf16(wide) : wide;
  }();
  return table;
}
#endif

inline const KernelTable& kernels(IsaChoice choice) {
  switch (choice.isa) {
#if defined(RMSNORM_X86_64)
    case Isa::avx2: return avx2::kernel_table();
    case Isa::avx512:
      return choice.automatic ? fastest_kernels(choice.isa) : avx512::kernel_table();
    case Isa::avx512_bf16:
      return choice.automatic ? fastest_kernels(choice.isa) : avx512_bf16_kernels();
#elif defined(RMSNORM_AARCH64)
    case Isa::neon: return neon::kernel_table();
#endif
    default: return scalar::kernel_table();
  }
}

// What remains to be checked once the parameters are known to be good: a range of `count` rows,
// blocks or columns.
inline Status check_call(std::int64_t begin, std::int64_t end, std::int64_t count,
                         Argument argument, IsaChoice choice) {
  if (begin < 0 || end < begin || end > count) return {Code::invalid_value, argument};
  if (!choice.ok || !available(choice.isa)) return {Code::isa_unavailable, Argument::isa};
  return {};
}

inline Status run_forward(const ForwardParams& p, std::int64_t row_begin, std::int64_t row_end,
                          IsaChoice choice) {
  const FloatEnvironment environment;
  RowLayout layout;
  Status status = check_and_lay_out(p, &layout);
  if (status.ok()) {
    status = check_call(row_begin, row_end, layout.rows(), Argument::rows, choice);
  }
  if (!status.ok() || row_begin == row_end) return status;
  return forward_rows(p, layout, row_begin, row_end, kernels(choice));
}

inline Status run_mean_square(const MeanSquareParams& p, std::int64_t row_begin,
                              std::int64_t row_end, IsaChoice choice) {
  const FloatEnvironment environment;
  RowLayout layout;
  Status status = check_and_lay_out(p, &layout);
  if (status.ok()) {
    status = check_call(row_begin, row_end, layout.rows(), Argument::rows, choice);
  }
  if (!status.ok() || row_begin == row_end) return status;
  const auto run = p.x.dtype == DType::f64 ? mean_square_rows<double> : mean_square_rows<float>;
  run(p, layout, row_begin, row_end, kernels(choice));
  return status;
}

inline Status check_parameters(const BackwardParams& p, TensorList<BackwardParams>& tensors) {
  const FloatEnvironment environment;
  return check(p, tensors);
}

}  // namespace detail

RMSNORM_INLINE Status forward(const ForwardParams& p, std::int64_t row_begin,
                              std::int64_t row_end) noexcept {
  return detail::run_forward(p, row_begin, row_end, active_isa());
}
RMSNORM_INLINE Status forward(const ForwardParams& p, std::int64_t row_begin, std::int64_t row_end,
                              Isa isa) noexcept {
  return detail::run_forward(p, row_begin, row_end, {isa, true});
}
RMSNORM_INLINE Status mean_square(const MeanSquareParams& p, std::int64_t row_begin,
                                  std::int64_t row_end) noexcept {
  return detail::run_mean_square(p, row_begin, row_end, active_isa());
}
RMSNORM_INLINE Status mean_square(const MeanSquareParams& p, std::int64_t row_begin,
                                  std::int64_t row_end, Isa isa) noexcept {
  return detail::run_mean_square(p, row_begin, row_end, {isa, true});
}

RMSNORM_INLINE BackwardPass::BackwardPass(const BackwardParams& p) noexcept
    : p_(p),
      status_(detail::check_parameters(p_, tensors_)),
      layout_(status_.ok() ? detail::layout_of(p_) : detail::RowLayout()),
      blocks_(detail::gradient_blocks(layout_).count()),
      workspace_bytes_(detail::GradientSums(p_, layout_.n()).bytes(blocks_)) {
  set_workspace(p.workspace, p.workspace_bytes);
}
RMSNORM_INLINE Status BackwardPass::set_workspace(void* memory, std::int64_t bytes) noexcept {
  if (!status_.ok()) return status_;
  p_.workspace = memory;
  p_.workspace_bytes = bytes;
  return workspace_status_ = detail::check_workspace(tensors_, memory, bytes, workspace_bytes_);
}
RMSNORM_INLINE Status BackwardPass::check_call(std::int64_t begin, std::int64_t end,
                                               std::int64_t count, Argument argument,
                                               IsaChoice choice) const {
  if (!status_.ok()) return status_;
  const Status status = detail::check_call(begin, end, count, argument, choice);
  return status.ok() ? workspace_status_ : status;
}
RMSNORM_INLINE Status BackwardPass::run_on(std::int64_t block_begin, std::int64_t block_end,
                                           IsaChoice choice) const {
  const Status status = check_call(block_begin, block_end, blocks_, Argument::blocks, choice);
  if (!status.ok() || block_begin == block_end) return status;
  const detail::FloatEnvironment environment;
  return detail::backward_of_blocks(p_, layout_, block_begin, block_end, detail::kernels(choice));
}
RMSNORM_INLINE Status BackwardPass::reduce_on(std::int64_t column_begin, std::int64_t column_end,
                                              IsaChoice choice) const {
  const Status status = check_call(column_begin, column_end, columns(), Argument::columns, choice);
  if (!status.ok() || column_begin == column_end) return status;
  const detail::FloatEnvironment environment;
  return detail::reduce_blocks(p_, layout_, column_begin, column_end, detail::kernels(choice));
}
RMSNORM_INLINE Status BackwardPass::run(std::int64_t block_begin,
                                        std::int64_t block_end) const noexcept {
  return run_on(block_begin, block_end, active_isa());
}
RMSNORM_INLINE Status BackwardPass::run(std::int64_t block_begin, std::int64_t block_end,
                                        Isa isa) const noexcept {
  return run_on(block_begin, block_end, {isa, true});
}
RMSNORM_INLINE Status BackwardPass::reduce(std::int64_t column_begin,
                                           std::int64_t column_end) const noexcept {
  return reduce_on(column_begin, column_end, active_isa());
}
RMSNORM_INLINE Status BackwardPass::reduce(std::int64_t column_begin, std::int64_t column_end,
                                           Isa isa) const noexcept {
  return reduce_on(column_begin, column_end, {isa, true});
}

RMSNORM_INLINE std::int64_t backward_blocks(const BackwardParams& p) noexcept {
  return BackwardPass(p).blocks();
}
RMSNORM_INLINE std::int64_t backward_workspace(const BackwardParams& p) noexcept {
  return BackwardPass(p).workspace_bytes();
}
RMSNORM_INLINE Status backward(const BackwardParams& p, std::int64_t block_begin,
                               std::int64_t block_end) noexcept {
  return BackwardPass(p).run(block_begin, block_end);
}
RMSNORM_INLINE Status backward(const BackwardParams& p, std::int64_t block_begin,
                               std::int64_t block_end, Isa isa) noexcept {
  return BackwardPass(p).run(block_begin, block_end, isa);
}
RMSNORM_INLINE Status backward_reduce(const BackwardParams& p, std::int64_t column_begin,
                                      std::int64_t column_end) noexcept {
  return BackwardPass(p).reduce(column_begin, column_end);
}
RMSNORM_INLINE Status backward_reduce(const BackwardParams& p, std::int64_t column_begin,
                                      std::int64_t column_end, Isa isa) noexcept {
  return BackwardPass(p).reduce(column_begin, column_end, isa);
}

}  // namespace cpu
}  // namespace rmsnorm
