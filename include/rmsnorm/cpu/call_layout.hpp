// The tensors of a call that is good as rows: any tensors that check() has found good, and a short
// way for those of the usual call, whose rows are evenly spaced and whose elements lie side by
// side. What the contract asks of these is a few comparisons each, on the way to the layout: a call
// of 1 x 8 elements with weight and rstd takes 480 instructions for both, where check() and the
// layout of any tensors take 1600.
#pragma once

#include <cstdint>

#include "../row_layout.hpp"
#include "kernel_table.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {

using namespace rmsnorm::detail;

// The layout of a good call of any tensors.
inline void lay_out(const ForwardParams& p, RowLayout* layout) {
  layout->set_shape(p.x, p.axis);
  layout->add(role_x, p.x);
  layout->add(role_residual, p.residual);
  layout->add(role_weight, p.weight);
  layout->add(role_bias, p.bias);
  layout->add(role_y, p.y);
  layout->add(role_residual_out, p.residual_out);
  layout->add_per_row(role_mean_square, p.mean_square);
  layout->add_per_row(role_rstd, p.rstd);
  layout->merge_rows();
}
inline void lay_out(const MeanSquareParams& p, RowLayout* layout) {
  layout->set_shape(p.x, p.axis);
  layout->add(role_x, p.x);
  layout->add_per_row(role_mean_square, p.mean_square);
  layout->merge_rows();
}

// The tensors of the usual call, added to its layout one after the other. Every function returns
// whether it has recognised what it was given. That refuses nothing: what is not recognised may
// still be good.
class MatrixLayout {
 public:
  explicit MatrixLayout(RowLayout* layout) : layout_(layout) {}

  // The sizes of x. Without elements there is little to compute, and sizes, strides and pointers
  // may be anything.
  bool set_shape(const ConstTensor& x, std::int32_t axis) {
    if (x.rank < 1 || x.rank > max_rank) return false;
    first_ = first_axis(x, axis);
    if (first_ < 0) return false;
    rank_ = x.rank;
    sizes_ = x.sizes;
    std::int64_t n = 1, rows = 1;
    for (int d = first_; d < rank_; ++d) {
      if (sizes_[d] < 1 || !multiply(&n, sizes_[d])) return false;
    }
    for (int d = 0; d < first_; ++d) {
      if (sizes_[d] < 1 || !multiply(&rows, sizes_[d])) return false;
    }
    layout_->set_matrix(rows, n);
    return true;
  }

  // A tensor of the sizes of x; of its normalised ones; of one element a row. An absent one has
  // none of these ranks.
  template <class Void>
  bool add_matrix(Role role, const BasicTensor<Void>& t) {
    return add(role, t, 0, rank_);
  }
  template <class Void>
  bool add_vector(Role role, const BasicTensor<Void>& t) {
    return add(role, t, first_, rank_);
  }
  template <class Void>
  bool add_column(Role role, const BasicTensor<Void>& t) {
    return add(role, t, 0, first_);
  }

  // Whether the tensor that was added last, an output, shares no memory with those before.
  bool last_is_apart() const {
    const int last = layout_->count() - 1;
    const Memory out = memory_[last];
    for (int i = 0; i < last; ++i) {
      if (!are_apart(out, memory_[i])) return false;
    }
    return true;
  }
  // The same of an output that may be x or the residual itself.
  bool last_is_apart_or_input() const {
    const int last = layout_->count() - 1;
    const Memory out = memory_[last];
    for (int i = 0; i < last; ++i) {
      if (are_apart(out, memory_[i])) continue;
      const Role role = layout_->role(i);
      if ((role != role_x && role != role_residual) || !are_same(last, i)) return false;
    }
    return true;
  }

 private:
  struct Memory {
    std::uintptr_t begin, end;
  };

  // Sizes and strides of more are left to check(). Below, nothing in the arithmetic on one tensor
  // exceeds 2^57 elements, which are 2^60 bytes.
  static constexpr std::int64_t most = std::int64_t{1} << 57;

  static bool multiply(std::int64_t* product, std::int64_t size) {
    *product = checked_product(*product, size);
    return static_cast<std::uint64_t>(*product) <= static_cast<std::uint64_t>(most);
  }

  static bool are_apart(const Memory& a, const Memory& b) {
    return a.end <= b.begin || b.end <= a.begin;
  }
  // Of two tensors of the sizes of x.
  bool are_same(int i, int j) const {
    const Operand& a = layout_->operand(layout_->role(i));
    const Operand& b = layout_->operand(layout_->role(j));
    return a.data == b.data && a.row_strides[0] == b.row_strides[0] &&
           size_in_bytes(a.dtype) == size_in_bytes(b.dtype);
  }

  // A tensor with dimensions [begin, end) of x. Each steps over the whole of the next one, but
  // there may be a gap between rows; the stride of a size of one means nothing.
  template <class Void>
  bool add(Role role, const BasicTensor<Void>& t, int begin, int end) {
    if (t.rank != end - begin || !is_valid(t.dtype)) return false;
    std::int64_t elements = 1, row_stride = 0, gap = 0;
    for (int d = end - 1; d >= begin; --d) {
      const std::int64_t size = t.sizes[d - begin], stride = t.strides[d - begin];
      if (size != sizes_[d]) return false;
      if (size == 1) continue;
      if (stride != elements) {
        if (d >= first_ || row_stride != 0 || stride < elements) return false;
        gap = stride - elements;
      }
      if (d < first_ && row_stride == 0) row_stride = stride;
      elements = stride;
      if (!multiply(&elements, size)) return false;
    }
    const std::int64_t size = size_in_bytes(t.dtype);
    const auto address = reinterpret_cast<std::uintptr_t>(t.data);
    if (address == 0 || (address & static_cast<std::uintptr_t>(size - 1)) != 0) return false;
    const std::uintptr_t after = address + static_cast<std::uintptr_t>((elements - gap) * size);
    if (after <= address) return false;
    memory_[layout_->count()] = {address, after};
    layout_->add_matrix(role, t, row_stride * size);
    return true;
  }

  RowLayout* layout_;
  const std::int64_t* sizes_;
  int rank_;
  int first_;
  Memory memory_[role_count];
};

// Whether the call is recognised: then check(p) finds it good and need not be asked, and `layout`,
// which has no tensors so far, is what lay_out() makes of it. Flattened, since what the functions
// above know of a call would go through memory between them: 850 instructions.
RMSNORM_FLATTEN inline bool lay_out_matrices(const ForwardParams& p, RowLayout* layout) {
  MatrixLayout m(layout);
  if (!m.set_shape(p.x, p.axis) || !m.add_matrix(role_x, p.x)) return false;
  if (p.residual.present() && !m.add_matrix(role_residual, p.residual)) return false;
  if (p.weight.present() && !m.add_vector(role_weight, p.weight)) return false;
  if (p.bias.present() && !m.add_vector(role_bias, p.bias)) return false;
  if (p.mean_square.present() && !m.add_column(role_mean_square, p.mean_square)) return false;
  if (!m.add_matrix(role_y, p.y) || !m.last_is_apart_or_input()) return false;
  if (p.residual_out.present()) {
    if (!m.add_matrix(role_residual_out, p.residual_out)) return false;
    if (!m.last_is_apart_or_input()) return false;
  }
  if (p.rstd.present() && !(m.add_column(role_rstd, p.rstd) && m.last_is_apart())) return false;
  Argument about;
  return check_rules(p, &about) == Code::ok;
}

RMSNORM_FLATTEN inline bool lay_out_matrices(const MeanSquareParams& p, RowLayout* layout) {
  MatrixLayout m(layout);
  if (!m.set_shape(p.x, p.axis) || !m.add_matrix(role_x, p.x)) return false;
  if (!m.add_column(role_mean_square, p.mean_square) || !m.last_is_apart()) return false;
  Argument about;
  return check_rules(p, &about) == Code::ok;
}

// check(p), and the layout of a call that is good, which has no tensors so far.
template <class Params>
Status check_and_lay_out(const Params& p, RowLayout* layout) {
  if (lay_out_matrices(p, layout)) return {};
  const Status status = check(p);
  if (status.ok()) lay_out(p, layout);
  return status;
}

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
