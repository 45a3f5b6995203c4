// The backward pass on the CPU: for each row of a block the statistics, where they are not given,
// then the sum of g * xhat, then dx and the row's part of the block's sums; afterwards, over the
// columns, the sums of the blocks. Kernels and scratch memory take turns as in forward.hpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "../check.hpp"
#include "../gradient_blocks.hpp"
#include "row_blocks.hpp"
#include "statistics.hpp"
#include "traffic.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {

// The sums of a block are written once and read once: 2 rows of f32 for the 3 * 64 that its rows
// read and write, 1 %. Fewer rows where less than 16 blocks would be left for threads, but no less
// than 8, at which the sums take 8 %. Sums of 64 terms err by 2^-18 of the sum of magnitudes.
inline std::int64_t rows_per_block(std::int64_t rows) {
  const std::int64_t share = rows / 16;
  return share < 8 ? 8 : share > 64 ? 64 : share;
}

inline GradientBlocks gradient_blocks(const RowLayout& layout) {
  return rmsnorm::detail::gradient_blocks(layout, rows_per_block);
}

// That of the rows' own kernels also for what has none, at other strides say.
inline ElementOrder gradient_order(const BackwardParams& p) {
  const bool pairs =
      p.x.dtype == DType::bf16 && p.dy.dtype == DType::bf16 && compute_type(p) == DType::f32;
  return pairs ? ElementOrder::pairs : ElementOrder::in_order;
}

template <class C>
class Backward {
 public:
  Backward(const BackwardParams& p, const RowLayout& layout, const KernelTable& table)
      : p_(p),
        layout_(layout),
        sums_(p, layout.n()),
        blocks_(gradient_blocks(layout)),
        source_(layout, table),
        traffic_(layout, {role_dy, role_x, role_d_residual, role_dx}, role_dx),
        order_(static_cast<int>(gradient_order(p))),
        statistics_(statistic_count(layout.n(), p.partial), p.eps, choose_sum_kind(p)),
        addend_role_(p.residual.present() ? role_residual : role_none) {
    // Adding -0.0 changes no weight; adding +0.0 would turn -0.0 into +0.0.
    rows_.offset = p.weight_offset != 0.0 ? p.weight_offset : -0.0;
    choose_kernels(table);
    const std::int64_t row_bytes =
        layout.n() * (size_in_bytes(p.x.dtype) + size_in_bytes(p.dy.dtype));
    const Traffic::Walk walk =
        traffic_.gradient_walk(row_bytes, p.x.dtype, shares_sums(p.x.dtype, layout.n()) ? 2 : 1);
    group_ = walk.group;
    rows_.fetches = walk.fetches;
  }

  void run(std::int64_t block_begin, std::int64_t block_end) {
    const std::int64_t last_row = blocks_.rows_of(block_end - 1).end - 1;
    rows_.streams = differentiate_ != nullptr && traffic_.streams(last_row);
    for (std::int64_t b = block_begin; b < block_end; ++b) run_block(b);
    if (rows_.streams) finish_streams();
  }

 private:
  // As forward does where y has the dtype of dy.
  static SumKind choose_sum_kind(const BackwardParams& p) {
    return sum_kind_of(p.x.dtype, is_16_bit(p.dy.dtype) && !p.residual.present());
  }

  bool is_plain(Role role, DType t) const {
    const Operand& o = layout_.operand(role);
    return !o.present || (o.unit && o.dtype == t);
  }

  void choose_kernels(const KernelTable& table) {
    correlate_ = differentiate_ = nullptr;
    measure_ = nullptr;
    const DType t = p_.x.dtype;
    if ((t == DType::f64) != (sizeof(C) == sizeof(double))) return;
    const Operand& w = layout_.operand(role_weight);
    const bool plain = is_plain(role_x, t) && is_plain(role_dy, t) && is_plain(role_dx, t) &&
                       is_plain(role_d_residual, t);
    if (!plain || p_.residual.present() || p_.mean_square.present() || p_.partial != 1.0) return;
    if (w.present && (!w.unit || (w.dtype != t && w.dtype != DType::f32))) return;
    const WeightKind kind = !w.present     ? WeightKind::none
                            : w.dtype == t ? WeightKind::same
                                           : WeightKind::f32;
    correlate_ = table.correlate[static_cast<int>(t)][static_cast<int>(kind)];
    differentiate_ = table.differentiate[static_cast<int>(t)][static_cast<int>(kind)];
    measure_ = table.measure[static_cast<int>(t)];
  }

  void run_block(std::int64_t index) {
    rows_.dweight = p_.dweight.present() ? sums_.row(p_.workspace, index, false) : nullptr;
    rows_.dbias =
        p_.dbias.present() ? sums_.row(p_.workspace, index, p_.dweight.present()) : nullptr;
    for (char* sums : {rows_.dweight, rows_.dbias}) {
      if (sums != nullptr) std::memset(sums, 0, static_cast<std::size_t>(sums_.stride));
    }
    const RowRange range = blocks_.rows_of(index);
    RowCursor cursor(layout_, range.begin);
    set_strides(cursor);
    for (std::int64_t left = range.end - range.begin; left > 0;) {
      std::int64_t rows = left < group_ ? left : group_;
      if (rows > cursor.run()) rows = cursor.run();
      run_rows(cursor, rows, left);
      cursor.advance(rows);
      left -= rows;
    }
  }

  void set_strides(const RowCursor& cursor) {
    rows_.dy_stride = cursor.stride(role_dy);
    rows_.x_stride = cursor.stride(role_x);
    rows_.w_stride = cursor.stride(role_weight);
    rows_.d_residual_stride = cursor.stride(role_d_residual);
    rows_.dx_stride = cursor.stride(role_dx);
    rows_.dy_ahead = cursor.ahead(role_dy);
    rows_.x_ahead = cursor.ahead(role_x);
    rows_.d_residual_ahead = cursor.ahead(role_d_residual);
    rows_.dx_ahead = cursor.ahead(role_dx);
    rows_.n = layout_.n();
    measured_.x_stride = cursor.stride(role_x);
    measured_.x_ahead = cursor.ahead(role_x);
    measured_.n = layout_.n();
    measured_.counted = statistics_.count();
    measured_.eps = p_.eps;
    measured_.fetches = !fetches_well();
  }

  void run_rows(const RowCursor& cursor, std::int64_t rows, std::int64_t left) {
    double rstd[max_group], correlations[max_group];
    if (correlate_ == nullptr || !find_rstd(cursor, rows, rstd)) {
      RowScale scales[max_group];
      find_scales(cursor, rows, scales);
      for (std::int64_t i = 0; i < rows; ++i) run_in_blocks(cursor, i, scales[i]);
      return;
    }
    rows_.dy = cursor.row(role_dy);
    rows_.x = cursor.row(role_x);
    rows_.w = p_.weight.present() ? cursor.row(role_weight) : nullptr;
    rows_.d_residual = p_.d_residual.present() ? cursor.row(role_d_residual) : nullptr;
    rows_.dx = cursor.row(role_dx);
    rows_.rows = rows;
    rows_.rstd = rstd;
    rows_.correlations = correlations;
    if (rows_.fetches) rows_.next = traffic_.next_rows(cursor, rows, left, role_dy, role_x);
    correlate_(rows_);
    differentiate_(rows_);
  }

  // What belongs to a mean square in the range that forward computes without scaling.
  static bool is_safe_rstd(double rstd) {
    constexpr double least = sizeof(C) == sizeof(float) ? 0x1p-63 : 0x1p-500;
    constexpr double most = sizeof(C) == sizeof(float) ? 0x1p50 : 0x1p500;
    return (rstd >= least) & (rstd <= most);
  }

  // rstd of rows that have a kernel: false where one of them is not safe.
  bool find_rstd(const RowCursor& cursor, std::int64_t rows, double* rstd) {
    bool all_safe = true;
    if (p_.rstd.present()) {
      read_statistics(cursor.row(role_rstd), cursor.stride(role_rstd), p_.rstd.dtype, rows, rstd);
      for (std::int64_t i = 0; i < rows; ++i)
        rstd[i] = static_cast<double>(static_cast<C>(rstd[i]));
    } else {
      double mean_square[max_group];
      all_safe = measure(cursor, rows, mean_square, rstd);
    }
    for (std::int64_t i = 0; i < rows; ++i) all_safe = all_safe & is_safe_rstd(rstd[i]);
    return all_safe;
  }

  void find_scales(const RowCursor& cursor, std::int64_t rows, RowScale* scales) {
    double mean_square[max_group], rstd[max_group];
    bool measured = false;
    for (std::int64_t i = 0; i < rows; ++i) {
      if (p_.rstd.present()) {
        const double given = read_statistic(cursor.row(role_rstd, i), p_.rstd.dtype);
        scales[i] = {static_cast<double>(static_cast<C>(given)), 0, 0.0};
        if (is_safe_rstd(scales[i].rstd)) continue;
      }
      if (!measured) measure(cursor, rows, mean_square, rstd);
      measured = true;
      scales[i] = scale_of(cursor, i, mean_square[i], rstd[i]);
    }
  }

  // Their mean squares plus eps and 1 / sqrt of those. False: one is not in the safe range.
  bool measure(const RowCursor& cursor, std::int64_t rows, double* mean_square, double* rstd) {
    if (measure_ != nullptr) {
      measured_.x = cursor.row(role_x);
      measured_.rows = rows;
      return measure_(measured_, mean_square, rstd);
    }
    bool safe = true;
    for (std::int64_t i = 0; i < rows; ++i) {
      const Statistic<double> v = statistics_.plus_eps(mean_square_of(cursor, i), p_.eps);
      mean_square[i] = v.high;
      rstd[i] = reciprocal_root<C>(v);
      safe = safe & statistics_.is_safe(v.high);
    }
    return safe;
  }

  Statistic<double> mean_square_of(const RowCursor& cursor, std::int64_t i) {
    if (p_.mean_square.present()) {
      return {read_statistic(cursor.row(role_mean_square, i), p_.mean_square.dtype), 0.0};
    }
    source_.set(cursor, i, role_x, addend_role_);
    return statistics_.mean(statistics_.sum_of_squares(&source_, 0));
  }

  RowScale scale_of(const RowCursor& cursor, std::int64_t i, double mean_square, double rstd) {
    if (statistics_.is_safe(mean_square)) return {rstd, 0, 0.0};
    if (p_.mean_square.present()) {
      return rescue_given<C>(statistics_.plus_eps(mean_square_of(cursor, i), p_.eps));
    }
    source_.set(cursor, i, role_x, addend_role_);
    return statistics_.rescue_row({mean_square, 0.0}, &source_);
  }

  double mean_correlation(double sum) const {
    return static_cast<double>(static_cast<C>(sum / static_cast<double>(statistics_.count())));
  }

  void run_in_blocks(const RowCursor& cursor, std::int64_t i, const RowScale& scale) {
    source_.set(cursor, i, role_x, addend_role_);
    SquareSum sum = {};
    for_each_block(layout_.n(), [&](std::int64_t begin, std::int64_t count) {
      read_block(cursor, i, scale, begin, count);
      source_.ops().add_products[order_](g_, xhat_, count, &sum);
    });
    const double correlation = sum.total();
    if (p_.d_mean_square.present()) {
      const double rstd = std::ldexp(scale.rstd, scale.exponent);
      write_statistic(cursor.row(role_d_mean_square, i), p_.d_mean_square.dtype,
                      -0.5 * rstd * correlation * rstd);
    }
    const C minus_c = static_cast<C>(-mean_correlation(correlation));
    for_each_block(layout_.n(), [&](std::int64_t begin, std::int64_t count) {
      read_block(cursor, i, scale, begin, count);
      add_to_sums(begin, count);
      subtract_correlation(minus_c, begin, count);
      write_dx(cursor, i, scale, begin, count);
    });
  }

  // dy, g and xhat of a block.
  void read_block(const RowCursor& cursor, std::int64_t i, const RowScale& scale,
                  std::int64_t begin, std::int64_t count) {
    const BlockOps<C>& ops = source_.ops();
    source_.read(begin, count, xhat_);
    source_.scale(xhat_, count, scale.exponent);
    ops.scale(xhat_, static_cast<C>(scale.rstd), count);
    source_.widen(role_dy, cursor.row(role_dy, i), begin, count, dy_);
    std::memcpy(g_, dy_, sizeof(g_));
    if (!p_.weight.present()) return;
    source_.widen(role_weight, cursor.row(role_weight, i), begin, count, more_);
    ops.add_constant(more_, static_cast<C>(rows_.offset), count);
    ops.multiply(g_, more_, count);
  }

  void add_to_sums(std::int64_t begin, std::int64_t count) {
    const BlockOps<C>& ops = source_.ops();
    if (rows_.dweight != nullptr) {
      C* sums = reinterpret_cast<C*>(rows_.dweight) + begin;
      ops.accumulate_products[order_](sums, dy_, xhat_, count);
    }
    if (rows_.dbias != nullptr) {
      ops.accumulate[order_](reinterpret_cast<C*>(rows_.dbias) + begin, dy_, count);
    }
  }

  // g = fma(-c, xhat, g) in the counted part of the row, where rstd depends on x.
  void subtract_correlation(C minus_c, std::int64_t begin, std::int64_t count) {
    const std::int64_t counted = p_.mean_square.present() ? 0 : statistics_.count() - begin;
    if (counted <= 0) return;
    if (counted >= count) {
      source_.ops().add_scaled(g_, minus_c, xhat_, count);
      return;
    }
    std::memcpy(more_, g_, sizeof(g_));
    source_.ops().add_scaled(g_, minus_c, xhat_, counted);
    for (std::int64_t k = counted; k < count; ++k) g_[k] = more_[k];
  }

  void write_dx(const RowCursor& cursor, std::int64_t i, const RowScale& scale, std::int64_t begin,
                std::int64_t count) {
    const C rstd = static_cast<C>(scale.rstd);
    if (scale.exponent != 0) source_.scale(g_, count, scale.exponent);
    if (p_.d_residual.present()) {
      source_.widen(role_d_residual, cursor.row(role_d_residual, i), begin, count, more_);
      source_.ops().scale_add(g_, rstd, more_, count);
    } else {
      source_.ops().scale(g_, rstd, count);
    }
    source_.narrow(g_, role_dx, cursor.row(role_dx, i), begin, count);
  }

  const BackwardParams& p_;
  const RowLayout& layout_;
  GradientSums sums_;
  GradientBlocks blocks_;
  RowSource<C> source_;
  Traffic traffic_;
  int order_;
  RowStatistics<C> statistics_;
  Role addend_role_;
  GradientKernel correlate_, differentiate_;
  MeasureKernel measure_;
  MeasuredRows measured_;
  GradientRows rows_;
  int group_;
  alignas(64) C dy_[block];
  alignas(64) C g_[block];
  alignas(64) C xhat_[block];
  alignas(64) C more_[block];
};

// dweight and dbias from the sums of the blocks.
template <class C>
class GradientReduction {
 public:
  GradientReduction(const BackwardParams& p, const RowLayout& layout, const KernelTable& table)
      : p_(p),
        layout_(layout),
        sums_(p, layout.n()),
        blocks_(gradient_blocks(layout)),
        order_(gradient_order(p)),
        target_(layout, table) {}

  void run(std::int64_t column_begin, std::int64_t column_end) {
    if (p_.dweight.present()) write(role_dweight, false, column_begin, column_end);
    if (p_.dbias.present()) write(role_dbias, p_.dweight.present(), column_begin, column_end);
  }

 private:
  void write(Role role, bool second, std::int64_t column_begin, std::int64_t column_end) {
    const Operand& out = layout_.operand(role);
    if (out.data == nullptr) return;
    for_each_group<true>(out, 0, 0, out.data, [&](std::int64_t group, char* row) {
      // From a whole set on, whose sums may be in another order than its columns.
      const std::int64_t first = column_begin / lanes * lanes;
      for (std::int64_t i = first; i < column_end; i += block) {
        const std::int64_t count = column_end - i < block ? column_end - i : block;
        const std::int64_t skipped = i < column_begin ? column_begin - i : 0;
        // Sums of no rows are the zeros that are there already, however many they are and however
        // many groups would share them.
        if (blocks_.count() != 0) sum_columns(out, group, second, i, skipped, count);
        target_.narrow(values_, role, row, i + skipped, count - skipped);
      }
    });
  }

  // Of the columns from i on, all but those to be skipped.
  void sum_columns(const Operand& out, std::int64_t group, bool second, std::int64_t i,
                   std::int64_t skipped, std::int64_t count) {
    for (double& total : totals_) total = 0;
    for_each_group<false>(out, 0, group, nullptr, [&](std::int64_t shared, char*) {
      add_blocks(shared, second, i, (count + lanes - 1) / lanes * lanes);
    });
    for (std::int64_t k = skipped; k < count; ++k) {
      values_[k - skipped] = static_cast<C>(totals_[place_in_order(k, order_)]);
    }
  }

  // Visits the groups from `group` on along those dimensions over which the output varies, or along
  // the others, over which it is a sum; with the output's row.
  template <bool varying, class Visit>
  void for_each_group(const Operand& out, int d, std::int64_t group, char* row,
                      const Visit& visit) const {
    while (d < blocks_.group_rank && (out.row_strides[d] != 0) != varying) ++d;
    if (d == blocks_.group_rank) return visit(group, row);
    std::int64_t step = 1;
    for (int e = d + 1; e < blocks_.group_rank; ++e) step *= layout_.row_size(e);
    for (std::int64_t k = 0; k < layout_.row_size(d); ++k) {
      for_each_group<varying>(out, d + 1, group + k * step, row + k * out.row_strides[d], visit);
    }
  }

  void add_blocks(std::int64_t group, bool second, std::int64_t begin, std::int64_t count) {
    for (std::int64_t b = 0; b < blocks_.blocks_per_group; ++b) {
      const char* sums = sums_.row(p_.workspace, group * blocks_.blocks_per_group + b, second);
      target_.ops().add_to_totals(totals_, reinterpret_cast<const C*>(sums) + begin, count);
    }
  }

  const BackwardParams& p_;
  const RowLayout& layout_;
  GradientSums sums_;
  GradientBlocks blocks_;
  ElementOrder order_;
  RowSource<C> target_;
  alignas(64) double totals_[block];
  alignas(64) C values_[block] = {};
};

inline Status backward_of_blocks(const BackwardParams& p, const RowLayout& layout,
                                 std::int64_t block_begin, std::int64_t block_end,
                                 const KernelTable& table) {
  if (compute_type(p) == DType::f64) {
    Backward<double>(p, layout, table).run(block_begin, block_end);
  } else {
    Backward<float>(p, layout, table).run(block_begin, block_end);
  }
  return {};
}

inline Status reduce_blocks(const BackwardParams& p, const RowLayout& layout,
                            std::int64_t column_begin, std::int64_t column_end,
                            const KernelTable& table) {
  if (compute_type(p) == DType::f64) {
    GradientReduction<double>(p, layout, table).run(column_begin, column_end);
  } else {
    GradientReduction<float>(p, layout, table).run(column_begin, column_end);
  }
  return {};
}

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
