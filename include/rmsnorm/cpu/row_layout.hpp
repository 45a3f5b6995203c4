// From tensor views to rows: where each tensor's row starts, how its elements lie within the row,
// and the walk over the rows of a range.
#pragma once

#include <cstdint>
#include <cstring>

#include "../check.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {

using rmsnorm::detail::TensorRef;

// The tensors of an operation, as indices into RowLayout::operands.
enum Role : int {
  role_x,
  role_residual,
  role_weight,
  role_bias,
  role_mean_square,
  role_y,
  role_residual_out,
  role_rstd,
  role_none
};
constexpr int role_count = role_none;

struct Operand {
  bool present = false;
  bool unit = false;  // the elements of a row lie side by side, and aligned to their size
  DType dtype = DType::f32;
  char* data;
  std::int64_t row_strides[max_rank];    // bytes, per row dimension of the layout; broadcast: 0
  std::int64_t inner_strides[max_rank];  // bytes, per normalised dimension
};

// The common shape: row dimensions (those before the axis, merged where all tensors allow it) and
// normalised dimensions.
class RowLayout {
 public:
  RowLayout(const TensorRef& x, std::int32_t axis) {
    const int first = rmsnorm::detail::first_axis(x, axis);
    row_rank_ = first;
    inner_rank_ = x.rank - first;
    for (int d = 0; d < first; ++d) row_sizes_[d] = x.sizes[d];
    for (int d = 0; d < inner_rank_; ++d) {
      inner_sizes_[d] = x.sizes[first + d];
      n_ *= inner_sizes_[d];
    }
  }

  // A tensor with normalised dimensions; leading ones are missing, of size one, or those of x.
  void add(Role role, const TensorRef& t) {
    if (!t.present()) return;
    if (n_ == 0) return add_empty(role, t);
    Operand& o = add_rows(role, t, t.rank - inner_rank_);
    std::int64_t packed = size_in_bytes(t.dtype);
    // Kernels may assume aligned elements; others, as in packed records, are gathered.
    o.unit = reinterpret_cast<std::uintptr_t>(t.data) % static_cast<std::uintptr_t>(packed) == 0;
    for (int d = inner_rank_ - 1; d >= 0; --d) {
      // The stride of a dimension of size one may be anything, and is not stepped.
      const std::int64_t stride = t.strides[t.rank - inner_rank_ + d];
      o.inner_strides[d] = inner_sizes_[d] == 1 ? 0 : stride * size_in_bytes(t.dtype);
      if (inner_sizes_[d] != 1 && o.inner_strides[d] != packed) o.unit = false;
      packed *= inner_sizes_[d];
    }
  }

  // A tensor with one element a row.
  void add_per_row(Role role, const TensorRef& t) {
    if (t.present()) add_rows(role, t, t.rank);
  }

  // Merges row dimensions that every tensor walks as one, after all tensors were added.
  void merge_rows() {
    int kept = 0;
    for (int d = 0; d < row_rank_; ++d) {
      if (row_sizes_[d] == 1) continue;
      if (kept > 0 && mergeable(kept - 1, d)) {
        row_sizes_[kept - 1] *= row_sizes_[d];
        for (Operand& o : operands_) {
          if (o.present) o.row_strides[kept - 1] = o.row_strides[d];
        }
      } else {
        row_sizes_[kept] = row_sizes_[d];
        for (Operand& o : operands_) {
          if (o.present) o.row_strides[kept] = o.row_strides[d];
        }
        ++kept;
      }
    }
    row_rank_ = kept;
  }

  const Operand& operand(Role role) const { return operands_[role]; }
  std::int64_t n() const { return n_; }
  int row_rank() const { return row_rank_; }
  std::int64_t row_size(int d) const { return row_sizes_[d]; }

  // Copies elements [begin, begin + count) of the row at `row` to packed memory, or back.
  template <class T>
  void gather(const Operand& o, const char* row, std::int64_t begin, std::int64_t count,
              void* packed) const {
    char* to = static_cast<char*>(packed);
    for_each_element(o, begin, count, [&](std::int64_t offset) {
      std::memcpy(to, row + offset, sizeof(T));
      to += sizeof(T);
    });
  }
  template <class T>
  void scatter(const Operand& o, char* row, std::int64_t begin, std::int64_t count,
               const void* packed) const {
    const char* from = static_cast<const char*>(packed);
    for_each_element(o, begin, count, [&](std::int64_t offset) {
      std::memcpy(row + offset, from, sizeof(T));
      from += sizeof(T);
    });
  }

 private:
  // No elements: the pointer may be null and does not move, whatever the strides say.
  void add_empty(Role role, const TensorRef& t) {
    Operand& o = operands_[role];
    o.present = true;
    o.unit = true;
    o.dtype = t.dtype;
    o.data = nullptr;
    for (int d = 0; d < row_rank_; ++d) o.row_strides[d] = 0;
    for (int d = 0; d < inner_rank_; ++d) o.inner_strides[d] = 0;
  }

  Operand& add_rows(Role role, const TensorRef& t, int leading) {
    Operand& o = operands_[role];
    o.present = true;
    o.dtype = t.dtype;
    o.data = const_cast<char*>(static_cast<const char*>(t.data));
    const int missing = row_rank_ - leading;
    for (int d = 0; d < row_rank_; ++d) {
      const bool broadcast = d < missing || t.sizes[d - missing] == 1;
      o.row_strides[d] = broadcast ? 0 : t.strides[d - missing] * size_in_bytes(t.dtype);
    }
    return o;
  }

  bool mergeable(int outer, int inner) const {
    for (const Operand& o : operands_) {
      if (o.present && o.row_strides[outer] != o.row_strides[inner] * row_sizes_[inner])
        return false;
    }
    return true;
  }

  template <class Visit>
  void for_each_element(const Operand& o, std::int64_t begin, std::int64_t count,
                        Visit visit) const {
    std::int64_t index[max_rank] = {};
    std::int64_t offset = 0;
    for (int d = inner_rank_ - 1; d >= 0; --d) {
      index[d] = begin % inner_sizes_[d];
      begin /= inner_sizes_[d];
      offset += index[d] * o.inner_strides[d];
    }
    const int last = inner_rank_ - 1;
    while (count > 0) {
      const std::int64_t left = inner_sizes_[last] - index[last];
      const std::int64_t run = left < count ? left : count;
      for (std::int64_t i = 0; i < run; ++i) visit(offset + i * o.inner_strides[last]);
      count -= run;
      if (count == 0) return;
      // The innermost dimension is exhausted: carry into the next ones.
      offset -= index[last] * o.inner_strides[last];
      index[last] = 0;
      for (int d = last - 1; d >= 0; --d) {
        offset += o.inner_strides[d];
        if (++index[d] < inner_sizes_[d]) break;
        offset -= inner_sizes_[d] * o.inner_strides[d];
        index[d] = 0;
      }
    }
  }

  Operand operands_[role_count];
  int row_rank_;
  int inner_rank_;
  std::int64_t row_sizes_[max_rank];
  std::int64_t inner_sizes_[max_rank];
  std::int64_t n_ = 1;
};

// A position in the rows of every tensor. Rows of the innermost row dimension are evenly spaced, so
// that kernels take several of them at once.
class RowCursor {
 public:
  RowCursor(const RowLayout& layout, std::int64_t row)
      : layout_(layout), last_(layout.row_rank() - 1) {
    for (int r = 0; r < role_count; ++r) {
      if (layout.operand(static_cast<Role>(r)).present) roles_[count_++] = static_cast<Role>(r);
    }
    for (int i = 0; i < count_; ++i) rows_[roles_[i]] = layout.operand(roles_[i]).data;
    for (int d = last_; d >= 0; --d) {
      index_[d] = row % layout.row_size(d);
      row /= layout.row_size(d);
      move(d, index_[d]);
    }
  }

  // How many rows from this one on are evenly spaced.
  std::int64_t run() const { return last_ < 0 ? 1 : layout_.row_size(last_) - index_[last_]; }
  // Bytes from row to row within a run; 0 for an absent tensor.
  std::int64_t stride(Role role) const {
    const Operand& o = layout_.operand(role);
    return o.present && last_ >= 0 ? o.row_strides[last_] : 0;
  }
  // Row i of the run.
  char* row(Role role, std::int64_t i = 0) const { return rows_[role] + i * stride(role); }

  // By at most run() rows.
  void advance(std::int64_t rows) {
    int d = last_;
    if (d < 0) return;
    move(d, rows);
    index_[d] += rows;
    for (; d > 0 && index_[d] == layout_.row_size(d); --d) {
      move(d, -layout_.row_size(d));
      index_[d] = 0;
      move(d - 1, 1);
      ++index_[d - 1];
    }
  }

 private:
  void move(int dimension, std::int64_t steps) {
    for (int i = 0; i < count_; ++i) {
      rows_[roles_[i]] += steps * layout_.operand(roles_[i]).row_strides[dimension];
    }
  }

  const RowLayout& layout_;
  int last_;  // the innermost row dimension, -1 where there is a single row
  Role roles_[role_count];
  int count_ = 0;
  char* rows_[role_count];
  std::int64_t index_[max_rank];
};

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
