// The forward pass on the CPU: for each row the statistics, then y. Rows whose tensors lie in unit
// stride and have one of the common dtype combinations go through a kernel of their own; all others
// go through scratch memory block by block, in the same order of operations.
#pragma once

#include <cmath>
#include <cstdint>

#include "../check.hpp"
#include "row_blocks.hpp"
#include "statistics.hpp"
#include "traffic.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {

template <class C>
class Forward {
 public:
  Forward(const ForwardParams& p, const RowLayout& layout, const KernelTable& table)
      : p_(p),
        layout_(layout),
        table_(table),
        source_(layout, table),
        traffic_(layout, {role_x, role_residual, role_y, role_residual_out}, role_y),
        normalised_dtype_(dtype_normalised(p)),
        sum_kind_(choose_sum_kind()),
        statistics_(statistic_count(layout.n(), p.partial), p.eps, sum_kind_) {
    if (p.residual.present() && p.round_residual) source_.round_sum_to(normalised_dtype_);
    weight_dtype_ = p.weight_offset != 0.0 ? dtype_of<C>::value : p.weight.dtype;
    // Adding -0.0 changes no weight; adding +0.0 would turn -0.0 into +0.0.
    offset_ = p.weight_offset != 0.0 ? p.weight_offset : -0.0;
    fused_add_ = choose_add();
    source_role_ = fused_add_ ? role_residual_out : role_x;
    addend_role_ = p.residual.present() && !fused_add_ ? role_residual : role_none;
    const bool plain =
        !p.residual.present() && is_plain(role_x, p.x.dtype) && kernels_sum_alike(p.x.dtype);
    sum_ = plain ? table.sum_rows[static_cast<int>(p.x.dtype)] : nullptr;
    apply_ = choose_apply();
    group_ =
        traffic_.rows_of_group(layout.n() * size_in_bytes(normalised_dtype_), normalised_dtype_, 1);
  }

  // Rows go through three steps in groups: between the statistics of a row and its first product
  // lie a quotient, a root and a quotient, some 75 cycles in a chain, which the rows of a group
  // share.
  void run(std::int64_t row_begin, std::int64_t row_end) {
    GroupStatistics<C> v;
    double rstd[max_group];
    RowCursor cursor(layout_, row_begin);
    set_strides(cursor);
    apply_rows_.streams = apply_ != nullptr && traffic_.streams(row_end - 1);
    for (std::int64_t left = row_end - row_begin; left > 0;) {
      std::int64_t rows = left < group_ ? left : group_;
      if (rows > cursor.run()) rows = cursor.run();
      measure_rows(cursor, rows, &v);
      bool all_safe = true;
      for (std::int64_t i = 0; i < rows; ++i) {
        v.set(i, statistics_.plus_eps(v[i], p_.eps));
        all_safe = all_safe & statistics_.is_safe(v[i].high);
        rstd[i] = reciprocal_root<C>(v[i]);
      }
      if (all_safe && apply_ != nullptr) {
        apply_rows(cursor, rows, left, rstd);
      } else {
        for (std::int64_t i = 0; i < rows; ++i) apply_in_blocks(cursor, i, v[i], rstd[i]);
      }
      cursor.advance(rows);
      left -= rows;
    }
    if (apply_rows_.streams) finish_streams();
  }

 private:
  const Operand& operand(Role role) const { return layout_.operand(role); }

  // Unit stride and the dtype whose kernels compute in C.
  bool is_plain(Role role, DType t) const {
    const Operand& o = operand(role);
    return o.present && o.unit && o.dtype == t &&
           (t == DType::f64) == (sizeof(C) == sizeof(double));
  }

  static DType dtype_normalised(const ForwardParams& p) {
    if (p.residual_out.present()) return p.residual_out.dtype;
    return p.residual.present() ? promote(p.x.dtype, p.residual.dtype) : p.x.dtype;
  }

  SumKind choose_sum_kind() const { return sum_kind_of(normalised_dtype_, is_16_bit(p_.y.dtype)); }
  // Whether the kernels of rows of t sum as this call does.
  bool kernels_sum_alike(DType t) const { return sum_kind_of(t, true) == sum_kind_; }

  // The kernel that adds, stores and squares in one pass; the norm then reads residual_out.
  AddSumKernel choose_add() const {
    const DType t = p_.x.dtype;
    // Without rounding the norm would need the sum as it was before the store, unless the store is
    // exact.
    const bool sum_is_stored = p_.round_residual || t == dtype_of<C>::value;
    const bool fused = sum_is_stored && is_plain(role_x, t) && is_plain(role_residual, t) &&
                       is_plain(role_residual_out, t) && kernels_sum_alike(t);
    return fused ? table_.add_sum_rows[static_cast<int>(t)] : nullptr;
  }

  ApplyKernel choose_apply() const {
    const DType t = operand(source_role_).dtype;
    if (addend_role_ != role_none || p_.bias.present()) return nullptr;
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

  // What the kernels' arguments have in common for all groups of rows.
  void set_strides(const RowCursor& cursor) {
    sum_rows_.x_stride = cursor.stride(role_x);
    sum_rows_.x_ahead = cursor.ahead(role_x);
    sum_rows_.n = statistics_.count();
    if (fused_add_ != nullptr) set_add_strides(cursor);
    apply_rows_.x_stride = cursor.stride(source_role_);
    apply_rows_.w_stride = cursor.stride(role_weight);
    apply_rows_.y_stride = cursor.stride(role_y);
    apply_rows_.y_ahead = cursor.ahead(role_y);
    apply_rows_.n = layout_.n();
    apply_rows_.offset = offset_;
  }

  void set_add_strides(const RowCursor& cursor) {
    add_rows_.x_stride = cursor.stride(role_x);
    add_rows_.residual_stride = cursor.stride(role_residual);
    add_rows_.out_stride = cursor.stride(role_residual_out);
    add_rows_.x_ahead = cursor.ahead(role_x);
    add_rows_.residual_ahead = cursor.ahead(role_residual);
    add_rows_.out_ahead = cursor.ahead(role_residual_out);
    add_rows_.n = layout_.n();
    add_rows_.counted = p_.mean_square.present() ? 0 : statistics_.count();
  }

  // The residual's addition, where a kernel does it, and the mean squares.
  void measure_rows(const RowCursor& cursor, std::int64_t rows, GroupStatistics<C>* mean_square) {
    if (fused_add_ != nullptr) {
      add_rows_.x = cursor.row(role_x);
      add_rows_.residual = cursor.row(role_residual);
      add_rows_.out = cursor.row(role_residual_out);
      add_rows_.rows = rows;
      add_rows_.sums = mean_square->sums();
      fused_add_(add_rows_);
    }
    if (p_.mean_square.present()) {
      for (std::int64_t i = 0; i < rows; ++i) {
        mean_square->set(
            i, {read_statistic(cursor.row(role_mean_square, i), p_.mean_square.dtype), 0.0});
      }
      return;
    }
    if (sum_ != nullptr) {
      sum_rows_.x = cursor.row(role_x);
      sum_rows_.rows = rows;
      sum_rows_.sums = mean_square->sums();
      sum_(sum_rows_);
    } else if (fused_add_ == nullptr) {
      for (std::int64_t i = 0; i < rows; ++i) {
        source_.set(cursor, i, source_role_, addend_role_);
        mean_square->set(i, statistics_.sum_of_squares(&source_, 0));
      }
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      mean_square->set(i, statistics_.mean((*mean_square)[i]));
    }
  }

  void write_rstd(const RowCursor& cursor, std::int64_t i, const RowScale& scale) const {
    if (!p_.rstd.present()) return;
    write_statistic(cursor.row(role_rstd, i), p_.rstd.dtype,
                    static_cast<double>(returned_rstd<C>(scale)));
  }

  void apply_rows(const RowCursor& cursor, std::int64_t rows, std::int64_t left, double* rstd) {
    if (p_.rstd.present()) {
      write_statistics(cursor.row(role_rstd), cursor.stride(role_rstd), p_.rstd.dtype, rows, rstd);
    }
    if (p_.rounding == Rounding::rstd) {
      for (std::int64_t i = 0; i < rows; ++i) rstd[i] = rounded_rstd(rstd[i]);
    }
    apply_rows_.x = cursor.row(source_role_);
    apply_rows_.w = p_.weight.present() ? cursor.row(role_weight) : nullptr;
    apply_rows_.y = cursor.row(role_y);
    apply_rows_.rows = rows;
    apply_rows_.rstd = rstd;
    apply_rows_.next = traffic_.next_rows(cursor, rows, left, role_x,
                                          fused_add_ != nullptr ? role_residual : role_none);
    apply_(apply_rows_);
  }

  void apply_in_blocks(const RowCursor& cursor, std::int64_t i, const Statistic<double>& v,
                       double unscaled_rstd) {
    source_.set(cursor, i, source_role_, addend_role_);
    RowScale scale = {unscaled_rstd, 0, 0.0};
    if (!statistics_.is_safe(v.high)) {
      scale = p_.mean_square.present() ? rescue_given<C>(v) : statistics_.rescue_row(v, &source_);
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
  Traffic traffic_;
  DType normalised_dtype_;
  SumKind sum_kind_;
  RowStatistics<C> statistics_;
  DType weight_dtype_;
  double offset_;
  AddSumKernel fused_add_;
  Role source_role_;
  Role addend_role_;
  SumKernel sum_;
  ApplyKernel apply_;
  SumRows sum_rows_;
  AddRows add_rows_;
  ApplyRows apply_rows_;
  int group_;
  alignas(64) C values_[block];
  alignas(64) C weight_[block];
  alignas(64) C bias_[block];
};

inline Status forward_rows(const ForwardParams& p, const RowLayout& layout, std::int64_t row_begin,
                           std::int64_t row_end, const KernelTable& table) {
  // Rows without elements: nothing but rstd would be written.
  if (layout.n() == 0 && !p.rstd.present()) return {};
  if (compute_type(p) == DType::f64) {
    Forward<double>(p, layout, table).run(row_begin, row_end);
  } else {
    Forward<float>(p, layout, table).run(row_begin, row_end);
  }
  return {};
}

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
