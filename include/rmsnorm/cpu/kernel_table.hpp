// What an ISA provides: a table of kernels over unit-stride memory, filled in by kernels.inl, which
// is compiled once per ISA. Everything about shapes, strides and options stays outside.
#pragma once

#include <cstdint>

#include "../contract.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {

// The sum of squares is defined over virtual lanes, so that it does not depend on the vector width:
// element i of a block goes to lane i mod 32 by fma, in the compute type. 32 lanes are four AVX2,
// two AVX-512 or eight NEON registers.
constexpr int lanes = 32;

// After each block the lanes are folded into eight double lanes. 8 fma per lane and block: in the
// worst case (a constant row whose square always rounds the same way) the four additions in the top
// binade leave 2 units in a sum of 2^24, 2^-24 relative in rstd; with 1024 elements it was 2^-22,
// which exceeds the 2.75 ulp of the contract by itself. Folding costs one conversion and one
// addition per four lanes, which hide behind the next block's loads.
constexpr int block = 256;

// The sum so far, in eight double lanes. For double elements lo collects the rounding errors of hi;
// for float elements, whose folded lanes leave 29 bits to spare, it is not used.
struct SquareSum {
  double hi[8];
  double lo[8];

  template <class C>
  double total() const {
    const double high = tree(hi);
    // An overflow leaves NaN in lo, which must not hide the infinity.
    const bool has_errors = sizeof(C) == sizeof(double) && high - high == 0.0;
    return has_errors ? high + tree(lo) : high;
  }

 private:
  static double tree(const double (&v)[8]) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
};

enum class WeightKind : int { none = 0, same = 1, f32 = 2 };
constexpr int weight_kind_count = 3;

// Kernels work on several evenly spaced rows, each in unit stride; strides are in bytes.

// sums[r] = sum of squares of the first n elements of row r.
using SumRows = void (*)(const char* x, std::int64_t x_stride, std::int64_t n, std::int64_t rows,
                         double* sums);

// out = cast(x + residual), all of one dtype, and sums[r] of the first `counted` elements of out.
struct AddRows {
  const char* x;
  const char* residual;
  char* out;
  std::int64_t x_stride, residual_stride, out_stride;
  std::int64_t n, counted, rows;
  double* sums;
};
using AddSumRows = void (*)(const AddRows& a);

// y = cast(cast_before(x * rstd[r]) * (offset + w)), y of x's dtype. An offset of -0.0 leaves every
// weight as it is. rstd and offset are values of the compute type.
struct ApplyRows {
  const char* x;
  const char* w;
  char* y;
  std::int64_t x_stride, w_stride, y_stride;
  std::int64_t n, rows;
  const double* rstd;
  double offset;
};
using Apply = void (*)(const ApplyRows& a);

// Operations on blocks of n <= `block` elements of the compute type C in scratch memory, for
// everything that has no kernel of its own. widen fills its target with zeros up to the next
// multiple of `lanes`, and the in-place operations work up to there.
template <class C>
struct BlockOps {
  // Adds the squares of n elements, a multiple of `block` in all but the last call of a row.
  void (*add_squares)(const C* v, std::int64_t n, SquareSum* sum);
  void (*widen[dtype_count])(const void* from, C* to, std::int64_t n);
  void (*narrow[dtype_count])(const C* from, void* to, std::int64_t n);
  void (*scale)(C* v, C factor, std::int64_t n);
  void (*add_constant)(C* v, C offset, std::int64_t n);
  void (*add)(C* v, const C* b, std::int64_t n);
  void (*multiply)(C* v, const C* w, std::int64_t n);
  void (*multiply_add)(C* v, const C* w, const C* b, std::int64_t n);
};

struct KernelTable {
  SumRows sum_rows[dtype_count];
  AddSumRows add_sum_rows[dtype_count];
  Apply apply[dtype_count][weight_kind_count][2];  // [x's dtype][weight][cast before the weight]
  BlockOps<float> f32_blocks;
  BlockOps<double> f64_blocks;
};

template <class C>
const BlockOps<C>& blocks(const KernelTable& table);
template <>
inline const BlockOps<float>& blocks<float>(const KernelTable& table) {
  return table.f32_blocks;
}
template <>
inline const BlockOps<double>& blocks<double>(const KernelTable& table) {
  return table.f64_blocks;
}

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
