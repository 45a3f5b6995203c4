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

  // From now on reads row i of the cursor's run: tensor `a`, plus `b` unless that is role_x.
  void set(const RowCursor& cursor, std::int64_t i, Role a, Role b) {
    a_ = a;
    b_ = b;
    row_a_ = cursor.row(a, i);
    row_b_ = b == role_x ? nullptr : cursor.row(b, i);
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

// The statistics of rows that have no kernel, and the exactly scaled second try where squares
// overflow or underflow.
template <class C>
class RowStatistics {
 public:
  RowStatistics(std::int64_t count, double eps) : count_(count), eps_(eps) {}

  // Of the source's values times 2^exponent.
  double sum_of_squares(RowSource<C>* source, int exponent) {
    SquareSum sum = {};
    for_each_block(count_, [&](std::int64_t begin, std::int64_t count) {
      source->read(begin, count, values_);
      source->scale(values_, count, exponent);
      source->ops().add_squares(values_, count, &sum);
    });
    return sum.total<C>();
  }

  double mean(double sum) const { return sum / static_cast<double>(count_); }

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

  // The scale of a row whose mean_square + eps is outside of the safe range.
  RowScale rescue_row(double v, RowSource<C>* source) {
    const int exponent = scale_exponent(source);
    if (exponent == 0) return {reciprocal_root<C>(v), 0};
    const double scaled = mean(sum_of_squares(source, exponent)) + std::ldexp(eps_, 2 * exponent);
    return {reciprocal_root<C>(scaled), exponent};
  }

  // With statistics that the caller gives, only 1 / sqrt can leave the range of C.
  static RowScale rescue_given(double v) {
    if (!(v > 0.0) || !rmsnorm::detail::is_finite(v)) return {reciprocal_root<C>(v), 0};
    const int exponent = -std::ilogb(v) / 2;
    return {reciprocal_root<C>(std::ldexp(v, 2 * exponent)), exponent};
  }

  std::int64_t count() const { return count_; }

 private:
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

// Rows of a group, and the bytes of them that are read again from the nearest cache.
constexpr int max_group = 16;
constexpr std::int64_t group_bytes = 16 * 1024;

template <class C>
class Forward {
 public:
  Forward(const ForwardParams& p, const RowLayout& layout, const KernelTable& table)
      : p_(p),
        layout_(layout),
        table_(table),
        source_(layout, table),
        statistics_(statistic_count(layout.n(), p.partial), p.eps) {
    const DType sum = p.residual.present() ? promote(p.x.dtype, p.residual.dtype) : p.x.dtype;
    normalised_dtype_ = p.residual_out.present() ? p.residual_out.dtype : sum;
    if (p.residual.present() && p.round_residual) source_.round_sum_to(normalised_dtype_);
    weight_dtype_ = p.weight_offset != 0.0 ? dtype_of<C>::value : p.weight.dtype;
    // Adding -0.0 changes no weight; adding +0.0 would turn -0.0 into +0.0.
    offset_ = p.weight_offset != 0.0 ? p.weight_offset : -0.0;
    fused_add_ = choose_add();
    source_role_ = fused_add_ ? role_residual_out : role_x;
    addend_role_ = p.residual.present() && !fused_add_ ? role_residual : role_x;
    const bool plain = !p.residual.present() && is_plain(role_x, p.x.dtype);
    sum_ = plain ? table.sum_rows[static_cast<int>(p.x.dtype)] : nullptr;
    apply_ = choose_apply();
    const std::int64_t row_bytes = layout.n() * size_in_bytes(normalised_dtype_);
    const std::int64_t group = row_bytes > 0 ? group_bytes / row_bytes : 1;
    group_ = group < 1 ? 1 : group > max_group ? max_group : static_cast<int>(group);
  }

  // Rows go through three steps in groups: between the statistics of a row and its first product
  // lie a quotient, a root and a quotient, some 75 cycles in a chain, which the rows of a group
  // share.
  void run(std::int64_t row_begin, std::int64_t row_end) {
    double v[max_group], rstd[max_group];
    RowCursor cursor(layout_, row_begin);
    for (std::int64_t left = row_end - row_begin; left > 0;) {
      std::int64_t rows = left < group_ ? left : group_;
      if (rows > cursor.run()) rows = cursor.run();
      measure_rows(cursor, rows, v);
      bool all_safe = true;
      for (std::int64_t i = 0; i < rows; ++i) {
        v[i] += p_.eps;
        all_safe = all_safe && statistics_.is_safe(v[i]);
        rstd[i] = reciprocal_root<C>(v[i]);
      }
      if (all_safe && apply_ != nullptr) {
        apply_rows(cursor, rows, rstd);
      } else {
        for (std::int64_t i = 0; i < rows; ++i) apply_in_blocks(cursor, i, v[i], rstd[i]);
      }
      cursor.advance(rows);
      left -= rows;
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
  AddSumRows choose_add() const {
    const DType t = p_.x.dtype;
    // Without rounding the norm would need the sum as it was before the store, unless the store is
    // exact.
    const bool sum_is_stored = p_.round_residual || t == dtype_of<C>::value;
    const bool fused = sum_is_stored && is_plain(role_x, t) && is_plain(role_residual, t) &&
                       is_plain(role_residual_out, t);
    return fused ? table_.add_sum_rows[static_cast<int>(t)] : nullptr;
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

  // The residual's addition, where a kernel does it, and the mean squares.
  void measure_rows(const RowCursor& cursor, std::int64_t rows, double* mean_square) {
    if (fused_add_ != nullptr) {
      fused_add_({cursor.row(role_x), cursor.row(role_residual), cursor.row(role_residual_out),
                  cursor.stride(role_x), cursor.stride(role_residual),
                  cursor.stride(role_residual_out), layout_.n(),
                  p_.mean_square.present() ? 0 : statistics_.count(), rows, mean_square});
    }
    if (p_.mean_square.present()) {
      for (std::int64_t i = 0; i < rows; ++i) {
        mean_square[i] = read_statistic(cursor.row(role_mean_square, i), p_.mean_square.dtype);
      }
      return;
    }
    if (sum_ != nullptr) {
      sum_(cursor.row(role_x), cursor.stride(role_x), statistics_.count(), rows, mean_square);
    } else if (fused_add_ == nullptr) {
      for (std::int64_t i = 0; i < rows; ++i) {
        source_.set(cursor, i, source_role_, addend_role_);
        mean_square[i] = statistics_.sum_of_squares(&source_, 0);
      }
    }
    for (std::int64_t i = 0; i < rows; ++i) mean_square[i] = statistics_.mean(mean_square[i]);
  }

  void write_rstd(const RowCursor& cursor, std::int64_t i, const RowScale& scale) const {
    if (!p_.rstd.present()) return;
    const double value = scale.exponent == 0 ? scale.rstd : std::ldexp(scale.rstd, scale.exponent);
    write_statistic(cursor.row(role_rstd, i), p_.rstd.dtype, value);
  }

  void apply_rows(const RowCursor& cursor, std::int64_t rows, double* rstd) {
    for (std::int64_t i = 0; i < rows; ++i) {
      write_rstd(cursor, i, {rstd[i], 0});
      rstd[i] = rounded_rstd(rstd[i]);
    }
    const bool weighted = p_.weight.present();
    apply_({cursor.row(source_role_), weighted ? cursor.row(role_weight) : nullptr,
            cursor.row(role_y), cursor.stride(source_role_),
            weighted ? cursor.stride(role_weight) : 0, cursor.stride(role_y), layout_.n(), rows,
            rstd, offset_});
  }

  void apply_in_blocks(const RowCursor& cursor, std::int64_t i, double v, double unscaled_rstd) {
    source_.set(cursor, i, source_role_, addend_role_);
    RowScale scale = {unscaled_rstd, 0};
    if (!statistics_.is_safe(v)) {
      scale = p_.mean_square.present() ? statistics_.rescue_given(v)
                                       : statistics_.rescue_row(v, &source_);
    }
    write_rstd(cursor, i, scale);
    const C rstd = static_cast<C>(rounded_rstd(scale.rstd));
    for_each_block(layout_.n(), [&](std::int64_t begin, std::int64_t count) {
      source_.read(begin, count, values_);
      if (p_.residual_out.present() && fused_add_ == nullptr) {
        source_.narrow(values_, role_residual_out, cursor.row(role_residual_out, i), begin, count);
      }
      source_.scale(values_, count, scale.exponent);
      source_.ops().scale(values_, rstd, count);
      if (p_.weight.present()) read_weight(cursor.row(role_weight, i), begin, count);
      if (p_.bias.present()) {
        source_.widen(role_bias, cursor.row(role_bias, i), begin, count, bias_);
      }
      if (p_.rounding == Rounding::once) {
        apply_once(count);
      } else {
        apply_rounded(count);
      }
      source_.narrow(values_, role_y, cursor.row(role_y, i), begin, count);
    });
  }

  double rounded_rstd(double rstd) {
    if (p_.rounding != Rounding::rstd) return rstd;
    C value[lanes] = {static_cast<C>(rstd)};
    source_.round(value, 1, normalised_dtype_);
    return static_cast<double>(value[0]);
  }

  void read_weight(const char* row, std::int64_t begin, std::int64_t count) {
    source_.widen(role_weight, row, begin, count, weight_);
    source_.ops().add_constant(weight_, static_cast<C>(offset_), count);
  }

  void apply_once(std::int64_t count) {
    if (p_.weight.present() && p_.bias.present()) {
      source_.ops().multiply_add(values_, weight_, bias_, count);
    } else if (p_.weight.present()) {
      source_.ops().multiply(values_, weight_, count);
    } else if (p_.bias.present()) {
      source_.ops().add(values_, bias_, count);
    }
  }

  void apply_rounded(std::int64_t count) {
    DType t = normalised_dtype_;
    source_.round(values_, count, t);
    if (p_.weight.present()) {
      source_.ops().multiply(values_, weight_, count);
      t = promote(t, weight_dtype_);
      source_.round(values_, count, t);
    }
    if (p_.bias.present()) {
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
  AddSumRows fused_add_;
  Role source_role_;
  Role addend_role_;
  SumRows sum_;
  Apply apply_;
  int group_;
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
  RowStatistics<C> statistics(statistic_count(layout.n(), p.partial), 0.0);
  const SumRows sum_rows = table.sum_rows[static_cast<int>(p.x.dtype)];
  RowCursor cursor(layout, row_begin);
  for (std::int64_t row = row_begin; row < row_end; ++row, cursor.advance(1)) {
    source.set(cursor, 0, role_x, role_x);
    double sum;
    if (layout.operand(role_x).unit) {
      sum_rows(cursor.row(role_x), 0, statistics.count(), 1, &sum);
    } else {
      sum = statistics.sum_of_squares(&source, 0);
    }
    double mean = statistics.mean(sum);
    if (!statistics.is_safe(mean)) {
      const int exponent = statistics.scale_exponent(&source);
      const double scaled = statistics.mean(statistics.sum_of_squares(&source, exponent));
      mean = std::ldexp(scaled, -2 * exponent);
    }
    write_statistic(cursor.row(role_mean_square), p.mean_square.dtype, mean);
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
