#include "parameters.hpp"

#include <algorithm>
#include <initializer_list>

namespace rmsnorm::python {
namespace {

template <class Tensor>
void fill(Tensor& t, const ArrayView& view) {
  if (!view.present()) return;
  t.data = view.data;
  t.dtype = view.dtype;
  t.rank = view.rank;
  std::copy_n(view.sizes, view.rank, t.sizes);
  std::copy_n(view.strides, view.rank, t.strides);
}

// How the dimensions of an array follow from those of x.
enum class Follows { x, rows, broadcast };

Follows follows(Argument argument) {
  switch (argument) {
    case Argument::weight:
    case Argument::bias: return Follows::broadcast;
    case Argument::mean_square:
    case Argument::rstd: return Follows::rows;
    default: return Follows::x;
  }
}

constexpr int max_arrays = 8;

class Merge {
 public:
  explicit Merge(const Call& call) : call_(call), axis_(call.first_axis()) {}

  // Every array of the call is added, then merge() is called, then the merged views are written.
  Status add(Argument argument) {
    const ArrayView& view = *call_.array(argument);
    if (!view.present()) return {};
    const ArrayView& x = call_.x;
    const Follows rule = follows(argument);
    const int rank = rule == Follows::rows ? axis_ : x.rank;
    const int skipped = rank - view.rank;  // leading dimensions that broadcasting adds
    if (skipped < 0 || skipped > (rule == Follows::broadcast ? axis_ : 0))
      return {Code::invalid_rank, argument};
    std::int64_t* strides = strides_[count_];
    std::fill_n(strides, x.rank, 0);
    for (int d = skipped; d < rank; ++d) {
      const std::int64_t size = view.sizes[d - skipped];
      const bool stretched = rule == Follows::broadcast && d < axis_ && size == 1;
      if (size != x.sizes[d] && !stretched) return {Code::invalid_size, argument};
      if (size != 1) strides[d] = view.strides[d - skipped];
    }
    arguments_[count_++] = argument;
    return {};
  }

  Status merge() {
    const ArrayView& x = call_.x;
    const bool empty = std::find(x.sizes, x.sizes + x.rank, 0) != x.sizes + x.rank;
    for (int d = 0; d < x.rank; ++d) {
      if (d == axis_) rows_rank_ = rank_;
      const bool normalised = d >= axis_;
      const bool last = d == x.rank - 1;
      if (x.sizes[d] == 1 && !(last && rank_ == rows_rank_)) continue;
      if (rank_ > (normalised ? rows_rank_ : 0) && (empty || merges(d))) {
        sizes_[rank_ - 1] *= x.sizes[d];
      } else {
        sizes_[rank_++] = x.sizes[d];
      }
      for (int i = 0; i < count_; ++i) strides_[i][rank_ - 1] = strides_[i][d];
    }
    return rank_ <= max_rank ? Status{} : Status{Code::invalid_rank, Argument::x};
  }

  template <class Tensor>
  void write(Argument argument, Tensor& t) const {
    const Argument* found = std::find(arguments_, arguments_ + count_, argument);
    if (found == arguments_ + count_) return;
    t.data = call_.array(argument)->data;
    t.dtype = call_.array(argument)->dtype;
    t.rank = follows(argument) == Follows::rows ? rows_rank_ : rank_;
    std::copy_n(sizes_, t.rank, t.sizes);
    std::copy_n(strides_[found - arguments_], t.rank, t.strides);
  }

  std::int32_t axis() const { return rows_rank_; }

 private:
  // Stepping once along the last kept dimension is stepping through all of dimension d.
  bool merges(int d) const {
    for (int i = 0; i < count_; ++i)
      if (strides_[i][rank_ - 1] != strides_[i][d] * call_.x.sizes[d]) return false;
    return true;
  }

  const Call& call_;
  const int axis_;
  int count_ = 0;
  Argument arguments_[max_arrays];
  // Of x's dimensions, then, in place, of the merged ones: rank_ never passes the d being read.
  std::int64_t strides_[max_arrays][max_dimensions];
  std::int64_t sizes_[max_dimensions];
  int rank_ = 0;
  int rows_rank_ = 0;  // merged dimensions before the normalised ones
};

}  // namespace

Status make_parameters(const Call& call, ForwardParams& p) {
  p.rounding = call.rounding;
  p.eps = call.eps;
  p.weight_offset = call.weight_offset;
  p.partial = call.partial;
  p.round_residual = call.round_residual;
  const int rank =
      std::max({call.x.rank, call.residual.rank, call.weight.rank, call.bias.rank,
                call.mean_square.rank, call.y.rank, call.residual_out.rank, call.rstd.rank});
  if (rank <= max_rank) {
    p.axis = call.axis;
    fill(p.x, call.x);
    fill(p.residual, call.residual);
    fill(p.weight, call.weight);
    fill(p.bias, call.bias);
    fill(p.mean_square, call.mean_square);
    fill(p.y, call.y);
    fill(p.residual_out, call.residual_out);
    fill(p.rstd, call.rstd);
    return {};
  }
  Merge merge(call);
  for (const Argument argument :
       {Argument::x, Argument::residual, Argument::weight, Argument::bias, Argument::mean_square,
        Argument::y, Argument::residual_out, Argument::rstd}) {
    const Status status = merge.add(argument);
    if (!status.ok()) return status;
  }
  const Status status = merge.merge();
  if (!status.ok()) return status;
  p.axis = merge.axis();
  merge.write(Argument::x, p.x);
  merge.write(Argument::residual, p.residual);
  merge.write(Argument::weight, p.weight);
  merge.write(Argument::bias, p.bias);
  merge.write(Argument::mean_square, p.mean_square);
  merge.write(Argument::y, p.y);
  merge.write(Argument::residual_out, p.residual_out);
  merge.write(Argument::rstd, p.rstd);
  return {};
}

Status make_parameters(const Call& call, MeanSquareParams& p) {
  p.partial = call.partial;
  if (std::max(call.x.rank, call.mean_square.rank) <= max_rank) {
    p.axis = call.axis;
    fill(p.x, call.x);
    fill(p.mean_square, call.mean_square);
    return {};
  }
  Merge merge(call);
  for (const Argument argument : {Argument::x, Argument::mean_square}) {
    const Status status = merge.add(argument);
    if (!status.ok()) return status;
  }
  const Status status = merge.merge();
  if (!status.ok()) return status;
  p.axis = merge.axis();
  merge.write(Argument::x, p.x);
  merge.write(Argument::mean_square, p.mean_square);
  return {};
}

}  // namespace rmsnorm::python
