// From the sum of squares to 1 / sqrt, with the exactly scaled second try for rows whose squares
// overflow or underflow, and mean_square on its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../check.hpp"
#include "../statistics.hpp"
#include "row_blocks.hpp"
#include "traffic.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {

// The statistics of rows that have no kernel, and the exactly scaled second try where squares
// overflow or underflow. Those of doubles are pairs; those of floats have a low part of zero.
template <class C>
class RowStatistics {
 public:
  using Statistic = rmsnorm::detail::Statistic<double>;
  static constexpr bool are_pairs = sizeof(C) == sizeof(double);

  RowStatistics(std::int64_t count, double eps, SumKind kind)
      : count_(count), eps_(eps), kind_(kind) {}

  // Of the source's values times 2^exponent.
  Statistic sum_of_squares(RowSource<C>* source, int exponent) {
    SquareSum sum = {};
    for_each_block(count_, [&](std::int64_t begin, std::int64_t count) {
      source->read(begin, count, values_);
      source->scale(values_, count, exponent);
      source->ops().add_squares[static_cast<int>(kind_)](values_, count, &sum);
    });
    if constexpr (are_pairs) return sum.compensated_total();
    return {sum.total(), 0.0};
  }

  Statistic mean(const Statistic& sum) const {
    const double count = static_cast<double>(count_);
    if constexpr (are_pairs) return mean_of(sum, count);
    return {sum.high / count, 0.0};
  }

  static Statistic plus_eps(const Statistic& mean, double eps) {
    if constexpr (are_pairs) return plus(mean, eps);
    return {mean.high + eps, 0.0};
  }

  static bool is_safe(double v) { return v >= SafeRange<C>::least && v <= SafeRange<C>::most; }

  // Of a row whose mean square is known to be outside of the safe range. A row with an infinity or
  // a NaN is left as it is, and one of nothing but zeros where eps is zero too: its mean square is
  // the right one.
  // Not inlined: gcc 12 then keeps the largest magnitude in memory, and a row takes four times as
  // long.
  RMSNORM_NOINLINE int scale_exponent(RowSource<C>* source) {
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
    if (!finite || (largest == 0 && eps_ == 0)) return 0;
    return exponent_to_one(static_cast<double>(largest), eps_);
  }

  // The scale of a row whose mean_square + eps is outside of the safe range.
  RowScale rescue_row(const Statistic& v, RowSource<C>* source) {
    const int exponent = scale_exponent(source);
    if (exponent == 0) return {reciprocal_root<C>(v), 0, 0.0};
    const Statistic scaled = mean(sum_of_squares(source, exponent));
    return in_one_factor(
        scale_of_root<C>(plus_eps(scaled, std::ldexp(eps_, 2 * exponent)), exponent));
  }

  std::int64_t count() const { return count_; }

 private:
  // Without the scale where rstd itself is a normal number of C. Its product with an element is
  // then rounded once, where a scaled element that is 2^126 smaller than the row's largest would
  // lose bits before it is multiplied by a scaled rstd of up to sqrt(count).
  static RowScale in_one_factor(const RowScale& scale) {
    const double rstd = std::ldexp(scale.rstd, scale.exponent);
    const bool normal =
        rstd >= std::numeric_limits<C>::min() && rstd <= std::numeric_limits<C>::max();
    return normal ? RowScale{rstd, 0, 0.0} : scale;
  }

  std::int64_t count_;
  double eps_;
  SumKind kind_;
  alignas(64) C values_[block];
};

// By memcpy: a statistic may lie unaligned in a record.
template <class T>
inline T read_as(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

inline double read_statistic(const char* p, DType t) {
  return t == DType::f64 ? read_as<double>(p) : static_cast<double>(read_as<float>(p));
}

// Those of evenly spaced rows.
inline void read_statistics(const char* p, std::int64_t stride, DType t, std::int64_t rows,
                            double* values) {
  if (t == DType::f64) {
    for (std::int64_t i = 0; i < rows; ++i) values[i] = read_as<double>(p + i * stride);
  } else {
    for (std::int64_t i = 0; i < rows; ++i) {
      values[i] = static_cast<double>(read_as<float>(p + i * stride));
    }
  }
}

inline void write_statistic(char* p, DType t, double value) {
  const float narrowed = static_cast<float>(value);
  if (t == DType::f64) {
    std::memcpy(p, &value, sizeof(value));
  } else {
    std::memcpy(p, &narrowed, sizeof(narrowed));
  }
}

inline void write_statistics(char* p, std::int64_t stride, DType t, std::int64_t rows,
                             const double* values) {
  for (std::int64_t i = 0; i < rows; ++i) write_statistic(p + i * stride, t, values[i]);
}

template <class C>
inline void mean_square_rows(const MeanSquareParams& p, const RowLayout& layout,
                             std::int64_t row_begin, std::int64_t row_end,
                             const KernelTable& table) {
  RowSource<C> source(layout, table);
  // In double lanes whatever the dtype, since the result is not narrow.
  RowStatistics<C> statistics(statistic_count(layout.n(), p.partial), 0.0, SumKind::double_lanes);
  const bool has_kernel = layout.operand(role_x).unit && !is_16_bit(p.x.dtype);
  const MeasureKernel measure = table.measure[static_cast<int>(p.x.dtype)];
  RowCursor cursor(layout, row_begin);
  MeasuredRows measured;
  measured.x_stride = cursor.stride(role_x);
  measured.x_ahead = cursor.ahead(role_x);
  measured.n = layout.n();
  measured.counted = statistics.count();
  double mean[max_group], rstd[max_group];
  measured.fetches = !fetches_well();
  for (std::int64_t left = row_end - row_begin; left > 0;) {
    std::int64_t rows = left < cursor.run() ? left : cursor.run();
    if (rows > max_group) rows = max_group;
    if (has_kernel) {
      measured.x = cursor.row(role_x);
      measured.rows = rows;
      measure(measured, mean, rstd);
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      source.set(cursor, i, role_x, role_none);
      if (!has_kernel) mean[i] = rounded(statistics.mean(statistics.sum_of_squares(&source, 0)));
      if (!statistics.is_safe(mean[i])) {
        const int exponent = statistics.scale_exponent(&source);
        const double scaled =
            rounded(statistics.mean(statistics.sum_of_squares(&source, exponent)));
        mean[i] = std::ldexp(scaled, -2 * exponent);
      }
      write_statistic(cursor.row(role_mean_square, i), p.mean_square.dtype, mean[i]);
    }
    cursor.advance(rows);
    left -= rows;
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
