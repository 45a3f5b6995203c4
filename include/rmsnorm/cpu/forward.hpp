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
    adds_ = can_add();
    source_role_ = adds_ ? role_residual_out : role_x;
    addend_role_ = p.residual.present() && !adds_ ? role_residual : role_none;
    measure_ = choose_measure();
    norm_ = choose_norm();
  }

  void run(std::int64_t row_begin, std::int64_t row_end) {
    RowCursor cursor(layout_, row_begin);
    set_strides(cursor);
    rows_.streams = norm_ != nullptr && traffic_.streams(row_end - 1);
    const Traffic::Walk walk = traffic_.walk(layout_.n(), normalised_dtype_, adds_, rows_.streams);
    rows_.walk = walk.order;
    rows_.group = walk.group;
    rows_.fetches = walk.fetches;
    if (walk.fetches || traffic_.is_far()) set_distances(cursor);
    for (std::int64_t left = row_end - row_begin; left > 0;) {
      const std::int64_t rows = left < cursor.run() ? left : cursor.run();
      if (norm_ != nullptr) {
        run_kernel(cursor, rows);
      } else {
        run_groups(cursor, rows);
      }
      cursor.advance(rows);
      left -= rows;
    }
    if (rows_.streams) finish_streams();
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

  // Whether a kernel adds, stores and squares in one pass; the norm then reads residual_out.
  bool can_add() const {
    const DType t = p_.x.dtype;
    // Without rounding the norm would need the sum as it was before the store, unless the store is
    // exact.
    const bool sum_is_stored = p_.round_residual || t == dtype_of<C>::value;
    return sum_is_stored && is_plain(role_x, t) && is_plain(role_residual, t) &&
           is_plain(role_residual_out, t) && kernels_sum_alike(t);
  }

  // Where statistics are given, the kernel is for the sum alone.
  MeasureKernel choose_measure() const {
    const DType t = p_.x.dtype;
    const bool measures = !p_.residual.present() && !p_.mean_square.present() &&
                          is_plain(role_x, t) && kernels_sum_alike(t);
    return adds_ || measures ? table_.measure[static_cast<int>(t)] : nullptr;
  }

  NormKernel choose_norm() const {
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
    return table_.norm[static_cast<int>(t)][static_cast<int>(kind)][round_before ? 1 : 0];
  }

  // What the kernels' arguments have in common for all rows.
  void set_strides(const RowCursor& cursor) {
    rows_.x_stride = cursor.stride(role_x);
    if (adds_) {
      rows_.residual_stride = cursor.stride(role_residual);
      rows_.out_stride = cursor.stride(role_residual_out);
    }
    rows_.n = layout_.n();
    rows_.counted = p_.mean_square.present() ? 0 : statistics_.count();
    rows_.eps = p_.eps;
    rows_.w_stride = cursor.stride(role_weight);
    rows_.y_stride = cursor.stride(role_y);
    rows_.offset = offset_;
    rows_.mean_square_stride = cursor.stride(role_mean_square);
    rows_.mean_square_is_double = p_.mean_square.dtype == DType::f64;
    rows_.rstd_stride = cursor.stride(role_rstd);
    rows_.rounds_rstd = p_.rounding == Rounding::rstd;
  }

  // How far ahead kernels fetch.
  void set_distances(const RowCursor& cursor) {
    // CPUs that fetch well are helped with rows of 16 bits and with those that go past the caches.
    // bf16 16384 x 256, cold, took over groups of rows with fetching: 1 KiB ahead 1.36, 2 KiB 1.10,
    // 4 KiB 0.84, 8 KiB 0.80; 4096 x 1024 took 1.28, 1.28, 0.91 and 0.97.
    const std::int64_t of_short_rows = fetches_well() ? 4096 : 1024;
    rows_.x_ahead = cursor.ahead(role_x, of_short_rows);
    rows_.y_ahead = cursor.ahead(role_y, of_short_rows);
    if (!adds_) return;
    rows_.residual_ahead = cursor.ahead(role_residual, of_short_rows);
    rows_.out_ahead = cursor.ahead(role_residual_out, of_short_rows);
  }

  // The rows of a run from row `first` on.
  void set_rows(const RowCursor& cursor, std::int64_t first, std::int64_t rows) {
    rows_.x = cursor.row(role_x, first);
    if (adds_) {
      rows_.residual = cursor.row(role_residual, first);
      rows_.out = cursor.row(role_residual_out, first);
    }
    rows_.w = p_.weight.present() ? cursor.row(role_weight, first) : nullptr;
    rows_.y = cursor.row(role_y, first);
    rows_.mean_square = p_.mean_square.present() ? cursor.row(role_mean_square, first) : nullptr;
    rows_.rstd = p_.rstd.present() ? cursor.row(role_rstd, first) : nullptr;
    rows_.rows = rows;
  }

  // Evenly spaced rows. Those that the kernel leaves, since one of them is not safe, go through
  // blocks.
  void run_kernel(const RowCursor& cursor, std::int64_t rows) {
    for (std::int64_t row = 0; row < rows;) {
      set_rows(cursor, row, rows - row);
      const NormProgress progress = norm_(rows_);
      const std::int64_t end = row + progress.measured;
      for (row += progress.done; row < end; ++row) {
        apply_in_blocks(cursor, row, find_scale(cursor, row));
      }
    }
  }

  // Evenly spaced rows that have no kernel, or one for their statistics alone.
  void run_groups(const RowCursor& cursor, std::int64_t rows) {
    double v[max_group], rstd[max_group];
    for (std::int64_t first = 0; first < rows; first += rows_.group) {
      set_rows(cursor, first, rows - first < rows_.group ? rows - first : rows_.group);
      const bool measured = measure_ != nullptr && measure_(rows_, v, rstd);
      for (std::int64_t i = 0; i < rows_.rows; ++i) {
        const bool is_found = measured && !p_.mean_square.present();
        const RowScale scale = is_found ? RowScale{rstd[i], 0, 0.0} : find_scale(cursor, first + i);
        apply_in_blocks(cursor, first + i, scale);
      }
    }
  }

  // What a row, whose residual is added already where a kernel does that, is multiplied by.
  RowScale find_scale(const RowCursor& cursor, std::int64_t row) {
    const bool given = p_.mean_square.present();
    source_.set(cursor, row, source_role_, addend_role_);
    const Statistic<double> mean =
        given ? Statistic<double>{read_statistic(cursor.row(role_mean_square, row),
                                                 p_.mean_square.dtype),
                                  0.0}
              : statistics_.mean(statistics_.sum_of_squares(&source_, 0));
    const Statistic<double> v = statistics_.plus_eps(mean, p_.eps);
    if (statistics_.is_safe(v.high)) return {reciprocal_root<C>(v), 0, 0.0};
    return given ? rescue_given<C>(v) : statistics_.rescue_row(v, &source_);
  }

  void write_rstd(const RowCursor& cursor, std::int64_t row, const RowScale& scale) const {
    if (!p_.rstd.present()) return;
    write_statistic(cursor.row(role_rstd, row), p_.rstd.dtype,
                    static_cast<double>(returned_rstd<C>(scale)));
  }

  void apply_in_blocks(const RowCursor& cursor, std::int64_t i, const RowScale& scale) {
    source_.set(cursor, i, source_role_, addend_role_);
    write_rstd(cursor, i, scale);
    const C rstd = static_cast<C>(rounded_rstd(scale.rstd));
    for_each_block(layout_.n(), [&](std::int64_t begin, std::int64_t count) {
      source_.read(begin, count, values_);
      if (p_.residual_out.present() && !adds_) {
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
  bool adds_;
  Role source_role_;
  Role addend_role_;
  MeasureKernel measure_;
  NormKernel norm_;
  NormRows rows_;
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
