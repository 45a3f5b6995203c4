// What an ISA provides: a table of kernels over unit-stride memory, filled in by kernels.inl, which
// is compiled once per ISA. Everything about shapes, strides and options stays outside.
#pragma once

#include <cstdint>

#include "../contract.hpp"
#include "../statistics.hpp"

// Ends an expression for the compiler: gcc contracts a product and a later sum into one fma, also
// when both are written as intrinsics. Costs no instruction.
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define RMSNORM_ROUND_HERE(value) __asm__("" : "+x"(value))
#elif defined(__GNUC__) && defined(__aarch64__)
#define RMSNORM_ROUND_HERE(value) __asm__("" : "+w"(value))
#elif defined(__GNUC__)
#define RMSNORM_ROUND_HERE(value) __asm__("" : "+m"(value))
#else
#define RMSNORM_ROUND_HERE(value) static_cast<void>(value)
#endif

// Inlines all that a kernel calls. By its own measure gcc leaves some steps of 32 elements as
// calls, which pass vectors through memory: three times the time of a bf16 row. Sanitizers check
// every access; with theirs inlined too a file takes minutes to compile.
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(undefined_behavior_sanitizer)
#define RMSNORM_FLATTEN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define RMSNORM_FLATTEN
#endif
#if !defined(RMSNORM_FLATTEN) && defined(__GNUC__) && defined(__OPTIMIZE__)
#define RMSNORM_FLATTEN __attribute__((flatten))
#elif !defined(RMSNORM_FLATTEN)
#define RMSNORM_FLATTEN
#endif

// What several kernels call: compiled once, and not into each of them.
#if defined(__GNUC__)
#define RMSNORM_NOINLINE __attribute__((noinline))
#elif defined(_MSC_VER)
#define RMSNORM_NOINLINE __declspec(noinline)
#else
#define RMSNORM_NOINLINE
#endif

namespace rmsnorm {
namespace cpu {
namespace detail {

// The sum of squares is defined over virtual lanes, so that it does not depend on the vector width:
// element i of a block goes to lane i mod 32 by fma. 32 float lanes are four AVX2, two AVX-512 or
// eight NEON registers, 32 double lanes twice as many.
constexpr int lanes = 32;

// After each block the lanes are folded into eight double lanes. Float lanes of eight terms err by
// at most 9 * 2^-24 of the sum (eight fma and one addition), 4.5 * 2^-24 of rstd, which is 0.001
// ulp of an f16. Folding costs one conversion and two additions per eight lanes.
constexpr int block = 256;

// The sum so far, in eight double lanes. lo collects the rounding errors of hi where squares of
// doubles are summed, and means nothing elsewhere.
struct SquareSum {
  using Statistic = rmsnorm::detail::Statistic<double>;

  double hi[8];
  double lo[8];

  double total() const {
    return ((hi[0] + hi[4]) + (hi[2] + hi[6])) + ((hi[1] + hi[5]) + (hi[3] + hi[7]));
  }
  // The same tree, whose roundings are added to those of the lanes.
  Statistic compensated_total() const {
    return joined(joined(joined(lane(0), lane(4)), joined(lane(2), lane(6))),
                  joined(joined(lane(1), lane(5)), joined(lane(3), lane(7))));
  }

 private:
  Statistic lane(int i) const { return {hi[i], lo[i]}; }
  static Statistic joined(const Statistic& a, const Statistic& b) {
    const Statistic sum = rmsnorm::detail::exact_sum(a.high, b.high);
    return {sum.high, (a.low + b.low) + sum.low};
  }
};

// Where element i lies in a set of 32: bf16 is read in pairs, whose even elements make one register
// and whose odd ones another, so that it is taken as 16 even elements and 16 odd ones.
enum class ElementOrder : int { in_order = 0, pairs = 1 };

constexpr std::int64_t place_in_order(std::int64_t i, ElementOrder order) {
  return order == ElementOrder::in_order ? i : (i & ~std::int64_t{31}) + i % 2 * 16 + i % 32 / 2;
}

// Which NaNs may be among floats that are rounded to bf16: any, or those alone whose lower 16 bits
// are zero, as they are in what was computed from bf16 and in the NaNs that operations make.
// Rounding by an addition carries the latter nowhere, so that they need no test.
enum class Nans : int { any, of_bf16 };
template <Nans nans>
struct NansOf {};

// Which lanes a block of floats is summed in: those that the row's own kernel would take.
enum class SumKind : int { float_lanes = 0, float_pairs = 1, double_lanes = 2 };
constexpr int sum_kind_count = 3;

// Between 16-bit tensors float lanes are accurate beyond what the result can show.
constexpr SumKind sum_kind_of(DType normalised, bool to_16_bit) {
  if (!to_16_bit || size_in_bytes(normalised) != 2) return SumKind::double_lanes;
  return normalised == DType::bf16 ? SumKind::float_pairs : SumKind::float_lanes;
}

enum class WeightKind : int { none = 0, same = 1, f32 = 2 };
constexpr int weight_kind_count = 3;

// Kernels work on several evenly spaced rows, each in unit stride; strides are in bytes. What a
// kernel is the first to touch it fetches `ahead` bytes before, see RowCursor::ahead.

// Rows whose mean squares are wanted: of x or, with a residual, of out = cast(x + residual), which
// is written then. All tensors have one dtype: f16 and bf16 are summed in float lanes, f32 in
// double lanes, f64 compensated.
struct MeasuredRows {
  const char* x = nullptr;
  const char* residual = nullptr;  // null: absent
  char* out = nullptr;
  std::int64_t x_stride = 0, residual_stride = 0, out_stride = 0;
  std::int64_t x_ahead = 0, residual_ahead = 0, out_ahead = 0;
  // counted: of n elements, those that the mean is of; none, where out alone is wanted.
  std::int64_t n = 0, counted = 0, rows = 0;
  double eps = 0;
  bool fetches = false;  // what is `ahead`
};
// Fills v, mean square plus eps, and rstd, 1 / sqrt of that as a value of the compute type, for
// each row, and up to the next multiple of eight rows with whatever. Returns whether every v is in
// SafeRange.
using MeasureKernel = bool (*)(const MeasuredRows& a, double* v, double* rstd);

// Rows of a group, at most.
constexpr int max_group = 16;

// Rows that are read twice in turn can be taken in several ways; the bits are the same.
enum class RowWalk : int {
  groups,        // the sums of a group of rows, then their products
  short_rows,    // the same of max_group rows of one block at most, without a call
  one_by_one,    // the sum of a row, or of two that share widened weights, then their products
  side_by_side,  // the products of as many together with the sums of later ones
};

// y = cast(cast_before(x * rstd) * (offset + w)) of rows of one dtype T, w absent, of T or f32;
// with a residual of out in place of x. An offset of -0.0, a value of the compute type, leaves
// every weight as it is.
struct NormRows : MeasuredRows {
  const char* w = nullptr;
  char* y = nullptr;
  std::int64_t w_stride = 0, y_stride = 0, y_ahead = 0;
  double offset = 0;
  const char* mean_square = nullptr;  // null: to be computed; else of each row, f32 or f64
  std::int64_t mean_square_stride = 0;
  bool mean_square_is_double = false;
  char* rstd = nullptr;  // null: not wanted; else of each row in the compute type
  std::int64_t rstd_stride = 0;
  bool rounds_rstd = false;  // to T before it is multiplied by
  bool streams = false;      // y is stored past the caches, to rows on 16-byte boundaries
  RowWalk walk = RowWalk::groups;
  int group = 1;  // rows
};
// How many rows, from the first on, are done: all of them, or those before some that end at row
// `measured` and of which one has a v that is not in SafeRange. Of these nothing is written but,
// with a residual, their rows of out.
struct NormProgress {
  std::int64_t done, measured;
};
using NormKernel = NormProgress (*)(const NormRows& a);

// The rows that are read after those of a call, one for each of them, as many bytes as a row of x
// has: fetched while results are stored. Null: nothing to fetch.
struct NextRows {
  const char* rows[2] = {};
  std::int64_t strides[2] = {};
};

// One row of a backward pass after the other: dy, x, d_residual and dx of one dtype T, the weight
// absent, of T or f32. g = dy * (offset + w) and xhat = x * rstd are rounded to the compute type.
// Order of a row's elements in 32 lanes and in the sums of dweight and dbias: `ElementOrder`.
struct GradientRows {
  const char* dy;
  const char* x;
  const char* w;
  const char* d_residual;  // null: absent
  char* dx;
  std::int64_t dy_stride, x_stride, w_stride, d_residual_stride, dx_stride;
  std::int64_t dy_ahead, x_ahead, d_residual_ahead, dx_ahead;
  std::int64_t n, rows;
  const double* rstd;
  // c of each row, the sum of g * xhat over n, rounded to C.
  double* correlations;
  double offset;
  // To which dy * xhat and dy are added, n elements of the compute type padded to whole sets of
  // lanes, 64-byte aligned; null: not wanted.
  char* dweight;
  char* dbias;
  bool fetches = true;  // what is `ahead`
  bool streams;         // dx
  NextRows next;
};
using GradientKernel = void (*)(const GradientRows& a);

// Whether two rows are differentiated at once. Of 256 x 4096 f32 elements that takes 1.23 times the
// time of reading dy and x and writing dx, one row at a time 1.45 (AVX2; AVX-512: 1.21 and 1.29).
// It gains nothing for 16-bit rows, whose conversions are the limit, and not where the next two
// rows would not stay in a cache of 512 KiB.
constexpr bool shares_sums(DType t, std::int64_t n) {
  return (t == DType::f32 || t == DType::f64) && n >= 1024 && n <= 16384;
}

// Operations on blocks of n <= `block` elements of the compute type C in scratch memory, for
// everything that has no kernel of its own. widen fills its target with zeros up to the next
// multiple of `lanes`, and the in-place operations work up to there, or not: what they leave behind
// the n elements is in no sum.
template <class C>
struct BlockOps {
  // [SumKind] Adds the squares of n elements, a multiple of `block` in all but a row's last call.
  // Doubles are summed in one way only.
  void (*add_squares[sum_kind_count])(const C* v, std::int64_t n, SquareSum* sum);
  void (*widen[dtype_count])(const void* from, C* to, std::int64_t n);
  void (*narrow[dtype_count])(const C* from, void* to, std::int64_t n);
  void (*scale)(C* v, C factor, std::int64_t n);
  void (*add_constant)(C* v, C offset, std::int64_t n);
  void (*add)(C* v, const C* b, std::int64_t n);
  void (*multiply)(C* v, const C* w, std::int64_t n);
  void (*multiply_add)(C* v, const C* w, const C* b, std::int64_t n);
  // v = fma(v, factor, b)
  void (*scale_add)(C* v, C factor, const C* b, std::int64_t n);
  // v = fma(w, factor, v)
  void (*add_scaled)(C* v, C factor, const C* w, std::int64_t n);
  // [ElementOrder] In the order of a row's own kernel. n as in add_squares.
  void (*add_products[2])(const C* a, const C* b, std::int64_t n, SquareSum* sum);
  void (*accumulate_products[2])(C* sums, const C* a, const C* b, std::int64_t n);
  void (*accumulate[2])(C* sums, const C* a, std::int64_t n);
  // In whatever order; n is a multiple of `lanes`.
  void (*add_to_totals)(double* totals, const C* sums, std::int64_t n);
};

struct KernelTable {
  MeasureKernel measure[dtype_count];
  NormKernel norm[dtype_count][weight_kind_count]
                 [2];  // [x's dtype][weight][cast before the weight]
  GradientKernel correlate[dtype_count][weight_kind_count];      // fills `correlations`
  GradientKernel differentiate[dtype_count][weight_kind_count];  // dx, dweight, dbias
  BlockOps<float> f32_blocks;
  BlockOps<double> f64_blocks;
};

// Those of rows of t from another table.
inline void take_kernels(const KernelTable& from, DType t, KernelTable* to) {
  const int dtype = static_cast<int>(t);
  to->measure[dtype] = from.measure[dtype];
  for (int w = 0; w < weight_kind_count; ++w) {
    for (int rounds = 0; rounds < 2; ++rounds) {
      to->norm[dtype][w][rounds] = from.norm[dtype][w][rounds];
    }
    to->correlate[dtype][w] = from.correlate[dtype][w];
    to->differentiate[dtype][w] = from.differentiate[dtype][w];
  }
}

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
