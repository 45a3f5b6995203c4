// The forward pass on the CPU: for each row the statistics, then y. Rows whose tensors lie in unit
// stride and have one of the common dtype combinations go through a kernel of their own; all others
// go through scratch memory block by block, in the same order of operations.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../check.hpp"
#include "float_environment.hpp"
#include "kernel_table.hpp"
#include "row_layout.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {

// Where mean_square + eps may lie for the row to be computed as it is. Below, squares that
// underflow could be missed: each costs at most half of the smallest denormal, 2^-150 or 2^-1075,
// so that at these bounds the relative error of the mean is below 2^-50 or 2^-75. Above, sums
// overflow.
template <class C>
struct SafeRange;
template <>
struct SafeRange<float> {
  static constexpr double least = 0x1p-100, most = 0x1p126;
};
template <>
struct SafeRange<double> {
  static constexpr double least = 0x1p-1000, most = 0x1p1020;
};

// 1 / sqrt(v), rounded to C. The root and the quotient in double leave 29 bits for float; for
// double their errors are removed by a Newton step on the exact residual 1 - v r^2.
template <class C>
inline double reciprocal_root(double v) {
  const double r = 1.0 / std::sqrt(v);
  if (sizeof(C) == sizeof(float)) return static_cast<double>(static_cast<float>(r));
  if (!(v >= SafeRange<double>::least && v <= SafeRange<double>::most)) return r;
  const double square = r * r;
  const double square_error = std::fma(r, r, -square);
  const double residual = std::fma(-v, square_error, std::fma(-v, square, 1.0));
  return std::fma(0.5 * r, residual, r);
}

// A row is normalised as (x * 2^exponent) * rstd.
struct RowScale {
  double rstd;
  int exponent;
};

inline std::int64_t statistic_count(std::int64_t n, double partial) {
  if (partial == 1.0) return n;
  const std::int64_t k = static_cast<std::int64_t>(std::ceil(partial * static_cast<double>(n)));
  return k < n ? k : n;
}

// The row of x, or x + residual, in blocks of the compute type.
template <class C>
class RowSource {
 public:
  RowSource(const RowLayout& layout, const KernelTable& table)
      : layout_(layout), ops_(blocks<C>(table)) {}

  // Rounding of x + residual, where it is to be rounded.
  void round_sum_to(DType t) {
    rounds_sum_ = true;
    sum_dtype_ = t;
  }

  // Reads the tensor `a`, plus `b` unless it is role_x, from now on, at the cursor's row.
  void set(const RowCursor& cursor, Role a, Role b) {
    a_ = a;
    b_ = b;
    row_a_ = cursor.row(a);
    row_b_ = b == role_x ? nullptr : cursor.row(b);
  }

  void read(std::int64_t begin, std::int64_t count, C* to) {
    widen(a_, row_a_, begin, count, to);
    if (row_b_ == nullptr) return;
    widen(b_, row_b_, begin, count, addend_);
    ops_.add(to, addend_, count);
    if (rounds_sum_) round(to, count, sum_dtype_);
  }

  void widen(Role role, const char* row, std::int64_t begin, std::int64_t count, C* to) {
    const Operand& o = layout_.operand(role);
    const void* from = row + begin * size_in_bytes(o.dtype);
    if (!o.unit) {
      const auto gather = o.dtype == DType::f64   ? &RowLayout::gather<std::uint64_t>
                          : o.dtype == DType::f32 ? &RowLayout::gather<std::uint32_t>
                                                  : &RowLayout::gather<std::uint16_t>;
      (layout_.*gather)(o, row, begin, count, packed_);
      from = packed_;
    }
    ops_.widen[static_cast<int>(o.dtype)](from, to, count);
  }

  void narrow(const C* from, Role role, char* row, std::int64_t begin, std::int64_t count) {
    const Operand& o = layout_.operand(role);
    if (o.unit) {
      ops_.narrow[static_cast<int>(o.dtype)](from, row + begin * size_in_bytes(o.dtype), count);
      return;
    }
    ops_.narrow[static_cast<int>(o.dtype)](from, packed_, count);
    const auto scatter = o.dtype == DType::f64   ? &RowLayout::scatter<std::uint64_t>
                         : o.dtype == DType::f32 ? &RowLayout::scatter<std::uint32_t>
                                                 : &RowLayout::scatter<std::uint16_t>;
    (layout_.*scatter)(o, row, begin, count, packed_);
  }

  void round(C* v, std::int64_t count, DType t) {
    if (size_in_bytes(t) >= static_cast<std::int64_t>(sizeof(C))) return;
    ops_.narrow[static_cast<int>(t)](v, packed_, count);
    ops_.widen[static_cast<int>(t)](packed_, v, count);
  }

  void scale(C* v, std::int64_t count, int exponent) {
    if (exponent == 0) return;
    // In two steps, since 2^exponent itself may exceed C.
    const int first = exponent / 2;
    ops_.scale(v, static_cast<C>(std::ldexp(1.0, first)), count);
    ops_.scale(v, static_cast<C>(std::ldexp(1.0, exponent - first)), count);
  }

  const BlockOps<C>& ops() const { return ops_; }

 private:
  const RowLayout& layout_;
  const BlockOps<C>& ops_;
  bool rounds_sum_ = false;
  DType sum_dtype_ = DType::f32;
  Role a_ = role_x, b_ = role_x;
  const char* row_a_ = nullptr;
  const char* row_b_ = nullptr;
  alignas(64) C addend_[block];
  alignas(64) std::uint64_t packed_[block];
};

// Calls visit(begin, count) for the blocks of a row.
template <class Visit>
inline void for_each_block(std::int64_t n, Visit visit) {
  for (std::int64_t i = 0; i < n; i += block) visit(i, n - i < block ? n - i : block);
}

// The statistics of rows, from kernels where the row lies in unit stride, and the exactly scaled
// second try where squares overflow or underflow.
template <class C>
class RowStatistics {
 public:
  RowStatistics(const KernelTable& table, std::int64_t count, double eps)
      : table_(table), count_(count), eps_(eps) {}

  // The sum of squares of the unit-stride row at `row` goes through one kernel call.
  void add_unit_row(DType t, const void* row, SquareSum* sum) const {
    table_.sum_of_squares[static_cast<int>(t)](row, count_, sum);
  }

  void add_blocks(RowSource<C>* source, int exponent, SquareSum* sum) {
    const SumOfSquares add = table_.sum_of_squares[static_cast<int>(dtype_of<C>::value)];
    for_each_block(count_, [&](std::int64_t begin, std::int64_t count) {
      source->read(begin, count, values_);
      source->scale(values_, count, exponent);
      add(values_, count, sum);
    });
  }

  double mean(const SquareSum& sum) const { return sum.total() / static_cast<double>(count_); }

  static bool is_safe(double v) { return v >= SafeRange<C>::least && v <= SafeRange<C>::most; }

  // Of a row whose mean square is known to be outside of the safe range. A row with an infinity, a
  // NaN or nothing but zeros is left as it is: its mean square is the right one.
  int scale_exponent(RowSource<C>* source) {
    C largest = 0;
    bool finite = true;
    for_each_block(count_, [&](std::int64_t begin, std::int64_t count) {
      source->read(begin, count, values_);
      for (std::int64_t i = 0; i < count; ++i) {
        const C a = std::fabs(values_[i]);
        if (!(a <= std::numeric_limits<C>::max())) finite = false;
        if (a > largest) largest = a;
      }
    });
    if (!finite || largest == 0) return 0;
    const double size = static_cast<double>(largest), root_eps = std::sqrt(eps_);
    return -std::ilogb(size > root_eps ? size : root_eps);
  }

  double scaled_mean(RowSource<C>* source, int exponent) {
    SquareSum sum;
    add_blocks(source, exponent, &sum);
    return mean(sum);
  }

  RowScale from_row(double mean_square, RowSource<C>* source) {
    const double v = mean_square + eps_;
    if (is_safe(v)) return {reciprocal_root<C>(v), 0};
    const int exponent = scale_exponent(source);
    if (exponent == 0) return {reciprocal_root<C>(v), 0};
    const double scaled = scaled_mean(source, exponent) + std::ldexp(eps_, 2 * exponent);
    return {reciprocal_root<C>(scaled), exponent};
  }

  // With statistics that the caller gives, only 1 / sqrt can leave the range of C.
  RowScale from_given(double mean_square) const {
    const double v = mean_square + eps_;
    if (is_safe(v) || !(v > 0.0) || !rmsnorm::detail::is_finite(v))
      return {reciprocal_root<C>(v), 0};
    const int exponent = -std::ilogb(v) / 2;
    return {reciprocal_root<C>(std::ldexp(v, 2 * exponent)), exponent};
  }

  std::int64_t count() const { return count_; }

 private:
  const KernelTable& table_;
  std::int64_t count_;
  double eps_;
  alignas(64) C values_[block];
};

inline double read_statistic(const char* p, DType t) {
  if (t == DType::f64) return *reinterpret_cast<const double*>(p);
  return static_cast<double>(*reinterpret_cast<const float*>(p));
}

inline void write_statistic(char* p, DType t, double value) {
  if (t == DType::f64) {
    *reinterpret_cast<double*>(p) = value;
  } else {
    *reinterpret_cast<float*>(p) = static_cast<float>(value);
  }
}

template <class C>
class Forward {
 public:
  Forward(const ForwardParams& p, const RowLayout& layout, const KernelTable& table)
      : p_(p),
        layout_(layout),
        table_(table),
        source_(layout, table),
        statistics_(table, statistic_count(layout.n(), p.partial), p.eps) {
    const DType sum = p.residual.present() ? promote(p.x.dtype, p.residual.dtype) : p.x.dtype;
    normalised_dtype_ = p.residual_out.present() ? p.residual_out.dtype : sum;
    if (p.residual.present() && p.round_residual) source_.round_sum_to(normalised_dtype_);
    weight_dtype_ = p.weight_offset != 0.0 ? dtype_of<C>::value : p.weight.dtype;
    // Adding -0.0 changes no weight; adding +0.0 would turn -0.0 into +0.0.
    offset_ = p.weight_offset != 0.0 ? p.weight_offset : -0.0;
    fused_add_ = choose_add();
    source_role_ = fused_add_ ? role_residual_out : role_x;
    addend_role_ = p.residual.present() && !fused_add_ ? role_residual : role_x;
    apply_ = choose_apply();
  }

  void run(std::int64_t row_begin, std::int64_t row_end) {
    RowCursor cursor(layout_, row_begin);
    for (std::int64_t row = row_begin; row < row_end; ++row, cursor.next()) {
      const RowScale scale = add_and_measure(cursor);
      const Operand& rstd = layout_.operand(role_rstd);
      if (rstd.present) {
        write_statistic(cursor.row(role_rstd), rstd.dtype, std::ldexp(scale.rstd, scale.exponent));
      }
      apply(cursor, scale);
    }
  }

 private:
  const Operand& operand(Role role) const { return layout_.operand(role); }

  // Unit stride and the dtype whose kernels compute in C.
  bool is_plain(Role role, DType t) const {
    const Operand& o = operand(role);
    return o.present && o.unit && o.dtype == t &&
           (t == DType::f64) == (sizeof(C) == sizeof(double));
  }

  // The kernel that adds, stores and squares in one pass; the norm then reads residual_out.
  AddSumOfSquares choose_add() const {
    const DType t = p_.x.dtype;
    // Without rounding the norm would need the sum as it was before the store, unless the store is
    // exact.
    const bool sum_is_stored = p_.round_residual || t == dtype_of<C>::value;
    const bool fused = sum_is_stored && is_plain(role_x, t) && is_plain(role_residual, t) &&
                       is_plain(role_residual_out, t);
    return fused ? table_.add_sum_of_squares[static_cast<int>(t)] : nullptr;
  }

  Apply choose_apply() const {
    const DType t = operand(source_role_).dtype;
    if (addend_role_ != role_x || p_.bias.present()) return nullptr;
    if (!is_plain(source_role_, t) || !is_plain(role_y, t)) return nullptr;
    WeightKind kind = WeightKind::none;
    if (p_.weight.present()) {
      const Operand& w = operand(role_weight);
      if (!w.unit || (w.dtype != t && w.dtype != DType::f32)) return nullptr;
      kind = w.dtype == t ? WeightKind::same : WeightKind::f32;
    }
    const bool round_before = p_.rounding != Rounding::once;
    return table_.apply[static_cast<int>(t)][static_cast<int>(kind)][round_before ? 1 : 0];
  }

  // The residual's addition, where a kernel does it, and the row's statistics.
  RowScale add_and_measure(const RowCursor& cursor) {
    const std::int64_t count = statistics_.count();
    const bool given = p_.mean_square.present();
    SquareSum sum;
    if (fused_add_ != nullptr) add_rows(cursor, given ? 0 : count, &sum);
    source_.set(cursor, source_role_, addend_role_);
    if (given) {
      return statistics_.from_given(
          read_statistic(cursor.row(role_mean_square), operand(role_mean_square).dtype));
    }
    if (fused_add_ == nullptr) {
      if (addend_role_ == role_x && is_plain(role_x, p_.x.dtype)) {
        statistics_.add_unit_row(p_.x.dtype, cursor.row(role_x), &sum);
      } else {
        statistics_.add_blocks(&source_, 0, &sum);
      }
    }
    return statistics_.from_row(statistics_.mean(sum), &source_);
  }

  void add_rows(const RowCursor& cursor, std::int64_t count, SquareSum* sum) const {
    const char* x = cursor.row(role_x);
    const char* residual = cursor.row(role_residual);
    char* out = cursor.row(role_residual_out);
    const std::int64_t counted = count * size_in_bytes(p_.x.dtype);
    SquareSum not_counted;
    fused_add_(x, residual, out, count, sum);
    fused_add_(x + counted, residual + counted, out + counted, layout_.n() - count, &not_counted);
  }

  void apply(const RowCursor& cursor, const RowScale& scale) {
    const double rstd = rounded_rstd(scale.rstd);
    if (apply_ != nullptr && scale.exponent == 0) {
      apply_(cursor.row(source_role_), p_.weight.present() ? cursor.row(role_weight) : nullptr,
             cursor.row(role_y), layout_.n(), rstd, offset_);
      return;
    }
    for_each_block(layout_.n(), [&](std::int64_t begin, std::int64_t count) {
      source_.read(begin, count, values_);
      if (p_.residual_out.present() && fused_add_ == nullptr) {
        source_.narrow(values_, role_residual_out, cursor.row(role_residual_out), begin, count);
      }
      source_.scale(values_, count, scale.exponent);
      source_.ops().scale(values_, static_cast<C>(rstd), count);
      if (p_.rounding == Rounding::once) {
        apply_once(cursor, begin, count);
      } else {
        apply_rounded(cursor, begin, count);
      }
      source_.narrow(values_, role_y, cursor.row(role_y), begin, count);
    });
  }

  double rounded_rstd(double rstd) {
    if (p_.rounding != Rounding::rstd) return rstd;
    C value[lanes] = {static_cast<C>(rstd)};
    source_.round(value, 1, normalised_dtype_);
    return static_cast<double>(value[0]);
  }

  void read_weight(const RowCursor& cursor, std::int64_t begin, std::int64_t count) {
    source_.widen(role_weight, cursor.row(role_weight), begin, count, weight_);
    source_.ops().add_constant(weight_, static_cast<C>(offset_), count);
  }

  void apply_once(const RowCursor& cursor, std::int64_t begin, std::int64_t count) {
    if (p_.bias.present()) source_.widen(role_bias, cursor.row(role_bias), begin, count, bias_);
    if (p_.weight.present()) read_weight(cursor, begin, count);
    if (p_.weight.present() && p_.bias.present()) {
      source_.ops().multiply_add(values_, weight_, bias_, count);
    } else if (p_.weight.present()) {
      source_.ops().multiply(values_, weight_, count);
    } else if (p_.bias.present()) {
      source_.ops().add(values_, bias_, count);
    }
  }

  void apply_rounded(const RowCursor& cursor, std::int64_t begin, std::int64_t count) {
    DType t = normalised_dtype_;
    source_.round(values_, count, t);
    if (p_.weight.present()) {
      read_weight(cursor, begin, count);
      source_.ops().multiply(values_, weight_, count);
      t = promote(t, weight_dtype_);
      source_.round(values_, count, t);
    }
    if (p_.bias.present()) {
      source_.widen(role_bias, cursor.row(role_bias), begin, count, bias_);
      source_.ops().add(values_, bias_, count);
      t = promote(t, p_.bias.dtype);
      source_.round(values_, count, t);
    }
  }

  const ForwardParams& p_;
  const RowLayout& layout_;
  const KernelTable& table_;
  RowSource<C> source_;
  RowStatistics<C> statistics_;
  DType normalised_dtype_;
  DType weight_dtype_;
  double offset_;
  AddSumOfSquares fused_add_;
  Role source_role_;
  Role addend_role_;
  Apply apply_;
  alignas(64) C values_[block];
  alignas(64) C weight_[block];
  alignas(64) C bias_[block];
};

inline Status forward_rows(const ForwardParams& p, std::int64_t row_begin, std::int64_t row_end,
                           const KernelTable& table) {
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
  const FloatEnvironment environment;
  if (compute_type(p) == DType::f64) {
    Forward<double>(p, layout, table).run(row_begin, row_end);
  } else {
    Forward<float>(p, layout, table).run(row_begin, row_end);
  }
  return {};
}

template <class C>
inline void mean_square_rows(const MeanSquareParams& p, const RowLayout& layout,
                             std::int64_t row_begin, std::int64_t row_end,
                             const KernelTable& table) {
  RowSource<C> source(layout, table);
  RowStatistics<C> statistics(table, statistic_count(layout.n(), p.partial), 0.0);
  const bool unit = layout.operand(role_x).unit;
  RowCursor cursor(layout, row_begin);
  for (std::int64_t row = row_begin; row < row_end; ++row, cursor.next()) {
    source.set(cursor, role_x, role_x);
    SquareSum sum;
    if (unit) {
      statistics.add_unit_row(p.x.dtype, cursor.row(role_x), &sum);
    } else {
      statistics.add_blocks(&source, 0, &sum);
    }
    double mean = statistics.mean(sum);
    if (!statistics.is_safe(mean)) {
      const int exponent = statistics.scale_exponent(&source);
      if (exponent != 0)
        mean = std::ldexp(statistics.scaled_mean(&source, exponent), -2 * exponent);
    }
    write_statistic(cursor.row(role_mean_square), p.mean_square.dtype, mean);
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
