// RMSNorm on the CPU. Include this one header, or link rmsnorm::rmsnorm, where the kernels are
// compiled once and this header only declares them (RMSNORM_COMPILED is then defined).
//
//   rmsnorm::ForwardParams p;
//   p.x = rmsnorm::matrix(x, rows, n);
//   p.weight = rmsnorm::vector(weight, n);
//   p.y = rmsnorm::matrix(y, rows, n);
//   const rmsnorm::Status status = rmsnorm::cpu::forward(p, 0, rows);
//   if (!status.ok()) std::fprintf(stderr, "%s %s\n", name(status.argument), text(status.code));
//
// Contract: contract.hpp. The functions keep no state, start no thread and allocate nothing: to use
// several threads, give each one a part of the rows. Results do not depend on the parts.
#pragma once

#include <cstdint>

#include "check.hpp"
#include "contract.hpp"
#include "cpu/isa.hpp"
#include "gradient_blocks.hpp"

namespace rmsnorm {
namespace cpu {

// Computes rows [row_begin, row_end) of row_count(p.x, p.axis), counted in row-major order of the
// dimensions before the axis, on active_isa() or on the given ISA. On any error nothing is written;
// beyond those of check(): invalid_value of Argument::rows for a range outside of the rows, and
// isa_unavailable.
Status forward(const ForwardParams& p, std::int64_t row_begin, std::int64_t row_end) noexcept;
Status forward(const ForwardParams& p, std::int64_t row_begin, std::int64_t row_end,
               Isa isa) noexcept;

Status mean_square(const MeanSquareParams& p, std::int64_t row_begin,
                   std::int64_t row_end) noexcept;
Status mean_square(const MeanSquareParams& p, std::int64_t row_begin, std::int64_t row_end,
                   Isa isa) noexcept;

// Backward works on blocks of rows, in whatever split over threads, and then, where dweight or
// dbias is present, sums what all blocks left in the workspace:
//
//   p.workspace_bytes = rmsnorm::cpu::backward_workspace(p);  // and p.workspace, at 64 bytes
//   status = rmsnorm::cpu::backward(p, 0, rmsnorm::cpu::backward_blocks(p));
//   if (status.ok()) status = rmsnorm::cpu::backward_reduce(p, 0, n);
//
// The numbers of blocks and bytes depend on sizes and dtypes alone. They are 0 for parameters that
// check() refuses and where no row has anything to be computed, bytes also without dweight and
// dbias; more bytes than 2^63 - 1 are that number.
std::int64_t backward_blocks(const BackwardParams& p) noexcept;
std::int64_t backward_workspace(const BackwardParams& p) noexcept;

// Writes dx and d_mean_square of the rows of blocks [block_begin, block_end), and their sums to the
// workspace. On any error nothing is written; beyond those of check(): Argument::blocks for a range
// outside of the blocks, Argument::workspace for one that is missing (null_data), too small
// (invalid_size), unaligned (invalid_value) or over a tensor (overlap), and isa_unavailable.
Status backward(const BackwardParams& p, std::int64_t block_begin, std::int64_t block_end) noexcept;
Status backward(const BackwardParams& p, std::int64_t block_begin, std::int64_t block_end,
                Isa isa) noexcept;

// Writes columns [column_begin, column_end) of the n normalised elements of every row of dweight
// and dbias, once all blocks are done. Errors as backward(), with Argument::columns.
Status backward_reduce(const BackwardParams& p, std::int64_t column_begin,
                       std::int64_t column_end) noexcept;
Status backward_reduce(const BackwardParams& p, std::int64_t column_begin, std::int64_t column_end,
                       Isa isa) noexcept;

// The four functions above check and lay out the parameters each time. This does so once, for any
// number of calls:
//
//   rmsnorm::cpu::BackwardPass pass(p);
//   rmsnorm::Status status = pass.set_workspace(memory, pass.workspace_bytes());
//   if (status.ok()) status = pass.run(0, pass.blocks());
//   if (status.ok()) status = pass.reduce(0, pass.columns());
//
// It keeps a copy of p, and p may go; the memory of the tensors must stay. Once the workspace is
// set, any number of threads may call run() at once, and after that reduce().
class BackwardPass {
 public:
  // Takes the workspace of p too, which set_workspace() may replace.
  explicit BackwardPass(const BackwardParams& p) noexcept;
  BackwardPass(const BackwardPass&) = delete;
  BackwardPass& operator=(const BackwardPass&) = delete;

  // Says what check(p) says. Where that is not ok, the numbers below are 0, and everything else
  // returns it.
  Status status() const noexcept { return status_; }

  // These are backward_blocks(p), the n of backward_reduce() and backward_workspace(p).
  std::int64_t blocks() const noexcept { return blocks_; }
  std::int64_t columns() const noexcept { return layout_.n(); }
  std::int64_t workspace_bytes() const noexcept { return workspace_bytes_; }

  // Has the sums of blocks written to `bytes` bytes at `memory` from now on. Errors are those of
  // backward() for a workspace, and run() and reduce() then return the same.
  Status set_workspace(void* memory, std::int64_t bytes) noexcept;

  // These do what backward() and backward_reduce() do, with the same errors.
  Status run(std::int64_t block_begin, std::int64_t block_end) const noexcept;
  Status run(std::int64_t block_begin, std::int64_t block_end, Isa isa) const noexcept;
  Status reduce(std::int64_t column_begin, std::int64_t column_end) const noexcept;
  Status reduce(std::int64_t column_begin, std::int64_t column_end, Isa isa) const noexcept;

 private:
  Status check_call(std::int64_t begin, std::int64_t end, std::int64_t count, Argument argument,
                    IsaChoice choice) const;
  Status run_on(std::int64_t block_begin, std::int64_t block_end, IsaChoice choice) const;
  Status reduce_on(std::int64_t column_begin, std::int64_t column_end, IsaChoice choice) const;

  BackwardParams p_;
  rmsnorm::detail::TensorList<BackwardParams> tensors_;  // of p_
  Status status_;
  rmsnorm::detail::RowLayout layout_;
  std::int64_t blocks_;
  std::int64_t workspace_bytes_;
  Status workspace_status_;
};

}  // namespace cpu
}  // namespace rmsnorm

#if !defined(RMSNORM_COMPILED)
#include "cpu/dispatch.hpp"
#endif
