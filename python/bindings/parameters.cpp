#include "parameters.hpp"

#include <algorithm>
#include <cstring>

namespace rmsnorm::python {
namespace {

// visit(argument, tensor) for every tensor of a parameter struct.
template <class Visit>
void for_each_tensor(ForwardParams& p, Visit visit) {
  visit(Argument::x, p.x);
  visit(Argument::residual, p.residual);
  visit(Argument::weight, p.weight);
  visit(Argument::bias, p.bias);
  visit(Argument::mean_square, p.mean_square);
  visit(Argument::y, p.y);
  visit(Argument::residual_out, p.residual_out);
  visit(Argument::rstd, p.rstd);
}
template <class Visit>
void for_each_tensor(MeanSquareParams& p, Visit visit) {
  visit(Argument::x, p.x);
  visit(Argument::mean_square, p.mean_square);
}
template <class Visit>
void for_each_tensor(BackwardParams& p, Visit visit) {
  visit(Argument::dy, p.dy);
  visit(Argument::x, p.x);
  visit(Argument::residual, p.residual);
  visit(Argument::weight, p.weight);
  visit(Argument::rstd, p.rstd);
  visit(Argument::mean_square, p.mean_square);
  visit(Argument::d_residual, p.d_residual);
  visit(Argument::dx, p.dx);
  visit(Argument::dweight, p.dweight);
  visit(Argument::dbias, p.dbias);
  visit(Argument::d_mean_square, p.d_mean_square);
}

template <class Tensor>
void fill(Tensor& t, const ArrayView& view) {
  if (!view.present()) return;
  t.data = view.data;
  t.dtype = view.dtype;
  t.rank = view.rank;
  // All of them, set or not: a few wide moves in place of two calls of memmove, 5 ns each.
  std::memcpy(t.sizes, view.sizes, sizeof(t.sizes));
  std::memcpy(t.strides, view.strides, sizeof(t.strides));
}

// How the dimensions of an array follow from those of x.
enum class Follows { x, rows, broadcast };

Follows follows(Argument argument) {
  switch (argument) {
    case Argument::weight:
    case Argument::bias:
    case Argument::dweight:
    case Argument::dbias: return Follows::broadcast;
    case Argument::mean_square:
    case Argument::rstd:
    case Argument::d_mean_square: return Follows::rows;
    default: return Follows::x;
  }
}

constexpr int max_arrays = 11;

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
    std::fill_n(stretched_[count_], x.rank, rule == Follows::broadcast);
    for (int d = skipped; d < rank; ++d) {
      const std::int64_t size = view.sizes[d - skipped];
      const bool stretched = rule == Follows::broadcast && d < axis_ && size == 1;
      if (size != x.sizes[d] && !stretched) return {Code::invalid_size, argument};
      stretched_[count_][d] = stretched;
      if (size != 1) strides[d] = view.strides[d - skipped];
    }
    arguments_[count_++] = argument;
    return {};
  }

  Status merge() {
    const ArrayView& x = call_.x;
    // Nothing is read or written then, but for the sums over no rows.
    const bool empty =
        call_.gradients == nullptr && std::find(x.sizes, x.sizes + x.rank, 0) != x.sizes + x.rank;
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
      for (int i = 0; i < count_; ++i) {
        strides_[i][rank_ - 1] = strides_[i][d];
        stretched_[i][rank_ - 1] = stretched_[i][d];
      }
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
    const auto index = found - arguments_;
    for (int d = 0; d < t.rank; ++d) t.sizes[d] = stretched_[index][d] ? 1 : sizes_[d];
    std::copy_n(strides_[index], t.rank, t.strides);
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
  // Where an array of one element is repeated along a dimension. Outputs that are sums keep it so.
  bool stretched_[max_arrays][max_dimensions];
  int rank_ = 0;
  int rows_rank_ = 0;  // merged dimensions before the normalised ones
};

// Sets the tensors and the axis of p.
template <class Params>
Status make_tensors(const Call& call, Params& p) {
  int rank = 0;
  for_each_tensor(p, [&](Argument argument, const auto&) {
    rank = std::max(rank, call.array(argument)->rank);
  });
  if (rank <= max_rank) {
    p.axis = call.axis;
    for_each_tensor(p,
                    [&](Argument argument, auto& tensor) { fill(tensor, *call.array(argument)); });
    return {};
  }
  Merge merge(call);
  Status status;
  for_each_tensor(p, [&](Argument argument, const auto&) {
    if (status.ok()) status = merge.add(argument);
  });
  if (status.ok()) status = merge.merge();
  if (!status.ok()) return status;
  p.axis = merge.axis();
  for_each_tensor(p, [&](Argument argument, auto& tensor) { merge.write(argument, tensor); });
  return {};
}

}  // namespace

Status make_parameters(const Call& call, ForwardParams& p) {
  p.rounding = call.rounding;
  p.eps = call.eps;
  p.weight_offset = call.weight_offset;
  p.partial = call.partial;
  p.round_residual = call.round_residual;
  return make_tensors(call, p);
}

Status make_parameters(const Call& call, MeanSquareParams& p) {
  p.partial = call.partial;
  return make_tensors(call, p);
}

Status make_parameters(const Call& call, BackwardParams& p) {
  const ArrayView &weight = call.weight, &dweight = call.gradients->dweight;
  if (dweight.present() && !std::equal(weight.sizes, weight.sizes + weight.rank, dweight.sizes,
                                       dweight.sizes + dweight.rank))
    return {Code::invalid_size, Argument::dweight};
  p.eps = call.eps;
  p.weight_offset = call.weight_offset;
  p.partial = call.partial;
  return make_tensors(call, p);
}

}  // namespace rmsnorm::python
