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

}  // namespace cpu
}  // namespace rmsnorm

#if !defined(RMSNORM_COMPILED)
#include "cpu/dispatch.hpp"
#endif
