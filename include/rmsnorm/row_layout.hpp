// From tensor views to rows: where each tensor's row starts and how its elements lie within the
// row.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "check.hpp"

namespace rmsnorm {
namespace detail {

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
  role_dy,
  role_d_residual,
  role_dx,
  role_dweight,
  role_dbias,
  role_d_mean_square,
  role_none
};
constexpr int role_count = role_none;

struct Operand {
  bool present = false;
  bool unit = false;  // the elements of a row lie side by side, and aligned to their size
  DType dtype = DType::f32;
  // Bytes from row to row in the innermost row dimension of the layout; 0 for an absent tensor and
  // where there is one row.
  std::int64_t run_stride = 0;
  char* data;                            // null where there are no elements
  std::int64_t row_strides[max_rank];    // bytes, per row dimension of the layout; broadcast: 0
  std::int64_t inner_strides[max_rank];  // bytes, per normalised dimension
};

// The common shape: row dimensions (those before the axis, merged where all tensors allow it) and
// normalised dimensions.
class RowLayout {
 public:
  // No tensors and no elements.
  RowLayout() : row_rank_(0), inner_rank_(0), n_(0) {}

  RowLayout(const TensorRef& x, std::int32_t axis) { set_shape(x, axis); }

  // The shape of x, and no tensors.
  void set_shape(const TensorRef& x, std::int32_t axis) {
    remove_tensors();
    n_ = 1;
    const int first = first_axis(x, axis);
    row_rank_ = first;
    inner_rank_ = x.rank - first;
    for (int d = 0; d < first; ++d) row_sizes_[d] = x.sizes[d];
    for (int d = 0; d < inner_rank_; ++d) {
      inner_sizes_[d] = x.sizes[first + d];
      n_ = saturated_product(n_, inner_sizes_[d]);
    }
  }

  // The shape of `rows` rows of `n` elements, and no tensors.
  void set_matrix(std::int64_t rows, std::int64_t n) {
    remove_tensors();
    row_rank_ = rows == 1 ? 0 : 1;
    row_sizes_[0] = rows;
    inner_rank_ = 1;
    inner_sizes_[0] = n_ = n;
  }

  // A tensor of that shape, `stride` bytes from row to row and 0 where there is one row, whose
  // elements lie side by side and aligned.
  template <class Void>
  void add_matrix(Role role, const BasicTensor<Void>& t, std::int64_t stride) {
    Operand& o = add_operand(role, t);
    o.unit = true;
    o.run_stride = o.row_strides[0] = stride;
    o.inner_strides[0] = size_in_bytes(t.dtype);
  }

  // A tensor with normalised dimensions; leading ones are missing, of size one, or those of x.
  template <class Void>
  void add(Role role, const BasicTensor<Void>& t) {
    if (t.present()) add_inner(role, t);
  }

  // A tensor with one element a row.
  template <class Void>
  void add_per_row(Role role, const BasicTensor<Void>& t) {
    if (!t.present()) return;
    if (!has_elements(t)) return add_empty(role, t);
    add_rows(role, t, t.rank);
  }

  // Moves the row dimensions over which one of these tensors varies before all others, after all
  // tensors were added.
  void put_first(std::initializer_list<Role> roles) {
    int place = 0;
    for (int d = 0; d < row_rank_; ++d) {
      if (!varies(roles, d)) continue;
      for (int i = d; i > place; --i) swap_rows(i - 1, i);
      ++place;
    }
  }

  // How many leading row dimensions one of these tensors varies over.
  int leading(std::initializer_list<Role> roles) const {
    int d = 0;
    while (d < row_rank_ && varies(roles, d)) ++d;
    return d;
  }

  // Merges row dimensions that every tensor walks as one, after all tensors were added.
  void merge_rows() {
    int kept = 0;
    for (int d = 0; d < row_rank_; ++d) {
      if (row_sizes_[d] == 1) continue;
      if (kept > 0 && mergeable(kept - 1, d)) {
        row_sizes_[kept - 1] = saturated_product(row_sizes_[kept - 1], row_sizes_[d]);
      } else {
        row_sizes_[kept++] = row_sizes_[d];
      }
      for (int i = 0; i < count_; ++i) {
        Operand& o = operands_[roles_[i]];
        o.row_strides[kept - 1] = o.row_strides[d];
      }
    }
    row_rank_ = kept;
    for (int i = 0; kept > 0 && i < count_; ++i) {
      Operand& o = operands_[roles_[i]];
      o.run_stride = o.row_strides[kept - 1];
    }
  }

  const Operand& operand(Role role) const { return operands_[role]; }
  // The tensors that are present, in the order of their addition.
  int count() const { return count_; }
  Role role(int i) const { return roles_[i]; }
  // Neither this nor rows() exceeds 2^59 where there are elements; without, each may be int64_max
  // in place of more.
  std::int64_t n() const { return n_; }
  int row_rank() const { return row_rank_; }
  std::int64_t row_size(int d) const { return row_sizes_[d]; }

  std::int64_t rows() const {
    std::int64_t rows = 1;
    for (int d = 0; d < row_rank_; ++d) rows = saturated_product(rows, row_sizes_[d]);
    return rows;
  }

  int inner_rank() const { return inner_rank_; }
  std::int64_t inner_size(int d) const { return inner_sizes_[d]; }

  // Calls visit with the byte offset from the start of its row of each of elements
  // [begin, begin + count).
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

 private:
  void remove_tensors() {
    for (int i = 0; i < count_; ++i) {
      operands_[roles_[i]].present = false;
      operands_[roles_[i]].run_stride = 0;
    }
    count_ = 0;
  }

  void add_inner(Role role, const TensorRef& t) {
    if (!has_elements(t)) return add_empty(role, t);
    Operand& o = add_rows(role, t, t.rank - inner_rank_);
    std::int64_t packed = size_in_bytes(t.dtype);
    // Kernels may assume aligned elements; others, as in packed records, are gathered.
    o.unit = is_aligned(t);
    for (int d = inner_rank_ - 1; d >= 0; --d) {
      // The stride of a dimension of size one may be anything, and is not stepped.
      const std::int64_t stride = t.strides[t.rank - inner_rank_ + d];
      o.inner_strides[d] = inner_sizes_[d] == 1 ? 0 : stride * size_in_bytes(t.dtype);
      if (inner_sizes_[d] != 1 && o.inner_strides[d] != packed) o.unit = false;
      packed *= inner_sizes_[d];
    }
  }

  static bool has_elements(const TensorRef& t) {
    for (int d = 0; d < t.rank; ++d) {
      if (t.sizes[d] == 0) return false;
    }
    return true;
  }

  // Sizes are powers of two, and a quotient takes some 25 cycles.
  static bool is_aligned(const TensorRef& t) {
    const auto below = static_cast<std::uintptr_t>(size_in_bytes(t.dtype)) - 1;
    return (reinterpret_cast<std::uintptr_t>(t.data) & below) == 0;
  }

  // No elements: the pointer may be null and does not move, whatever the strides say.
  void add_empty(Role role, const TensorRef& t) {
    Operand& o = add_operand(role, t);
    o.unit = true;
    o.data = nullptr;
    for (int d = 0; d < row_rank_; ++d) o.row_strides[d] = 0;
    for (int d = 0; d < inner_rank_; ++d) o.inner_strides[d] = 0;
  }

  Operand& add_operand(Role role, const TensorRef& t) {
    roles_[count_++] = role;
    Operand& o = operands_[role];
    o.present = true;
    o.dtype = t.dtype;
    o.data = const_cast<char*>(static_cast<const char*>(t.data));
    return o;
  }

  Operand& add_rows(Role role, const TensorRef& t, int leading) {
    Operand& o = add_operand(role, t);
    const int missing = row_rank_ - leading;
    for (int d = 0; d < row_rank_; ++d) {
      const bool broadcast = d < missing || t.sizes[d - missing] == 1;
      o.row_strides[d] = broadcast ? 0 : t.strides[d - missing] * size_in_bytes(t.dtype);
    }
    return o;
  }

  bool varies(std::initializer_list<Role> roles, int d) const {
    for (const Role role : roles) {
      const Operand& o = operands_[role];
      if (o.present && row_sizes_[d] != 1 && o.row_strides[d] != 0) return true;
    }
    return false;
  }

  void swap_rows(int a, int b) {
    const auto swap = [a, b](std::int64_t* values) {
      const std::int64_t value = values[a];
      values[a] = values[b];
      values[b] = value;
    };
    swap(row_sizes_);
    for (int i = 0; i < count_; ++i) swap(operands_[roles_[i]].row_strides);
  }

  bool mergeable(int outer, int inner) const {
    for (int i = 0; i < count_; ++i) {
      const Operand& o = operands_[roles_[i]];
      if (o.row_strides[outer] != o.row_strides[inner] * row_sizes_[inner]) return false;
    }
    return true;
  }

  Operand operands_[role_count];
  Role roles_[role_count];
  int count_ = 0;
  int row_rank_;
  int inner_rank_;
  std::int64_t row_sizes_[max_rank];
  std::int64_t inner_sizes_[max_rank];
  std::int64_t n_;
};

}  // namespace detail
}  // namespace rmsnorm
