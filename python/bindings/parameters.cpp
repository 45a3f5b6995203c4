#include "parameters.hpp"

#include <algorithm>
#include <cstring>
#include <rmsnorm/check.hpp>

namespace rmsnorm::python {
namespace {

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

int expected_rank(const Call& call, Follows rule) {
  return rule == Follows::rows ? call.first_axis() : call.x.rank;
}

bool has_elements(const ArrayView& view) {
  return std::find(view.sizes, view.sizes + view.rank, 0) == view.sizes + view.rank;
}

template <class Params>
class Merge {
 public:
  explicit Merge(const Call& call)
      : call_(call),
        axis_(call.first_axis()),
        has_rows_(std::find(call.x.sizes, call.x.sizes + axis_, 0) == call.x.sizes + axis_) {}

  // Every array of the call is added, then merge() is called, then the merged views are written.
  Status add(Argument argument) {
    const ArrayView& view = *call_.array(argument);
    if (!view.present()) return {};
    const Status status = check_shape(call_, argument);
    if (!status.ok()) return status;
    const ArrayView& x = call_.x;
    const Follows rule = follows(argument);
    const int rank = expected_rank(call_, rule);
    const int skipped = rank - view.rank;
    Walk& walk = walks_[count_];
    for (int d = 0; d < x.rank; ++d) walk.set(d, 0, rule == Follows::broadcast && d < axis_);
    for (int d = skipped; d < rank; ++d) {
      const std::int64_t size = view.sizes[d - skipped], stride = view.strides[d - skipped];
      if ((size == 1 && walk.stretched[d]) || !is_walked(view)) continue;
      const bool repeats = walk.stretched[d] && stride == 0 && is_free_to_stretch(argument);
      walk.set(d, size == 1 ? 0 : stride, repeats);
    }
    if (!has_elements(view)) std::fill_n(walk.stretched, x.rank, false);
    walk.argument = argument;
    ++count_;
    return {};
  }

  Status merge() {
    const ArrayView& x = call_.x;
    for (int d = 0; d < x.rank; ++d) {
      if (d == axis_) rows_rank_ = rank_;
      const bool normalised = d >= axis_;
      const bool last = d == x.rank - 1;
      if (x.sizes[d] == 1 && !(last && rank_ == rows_rank_)) continue;
      if (rank_ > (normalised ? rows_rank_ : 0) && merges(d)) {
        sizes_[rank_ - 1] = rmsnorm::detail::saturated_product(sizes_[rank_ - 1], x.sizes[d]);
      } else {
        sizes_[rank_++] = x.sizes[d];
      }
      for (int i = 0; i < count_; ++i)
        walks_[i].set(rank_ - 1, walks_[i].strides[d], walks_[i].stretched[d]);
    }
    return rank_ <= max_rank ? Status{} : Status{Code::invalid_rank, Argument::x};
  }

  template <class Tensor>
  void write(Argument argument, Tensor& t) const {
    const Walk* walk = std::find_if(walks_, walks_ + count_,
                                    [argument](const Walk& w) { return w.argument == argument; });
    if (walk == walks_ + count_) return;
    t.data = call_.array(argument)->data;
    t.dtype = call_.array(argument)->dtype;
    t.rank = follows(argument) == Follows::rows ? rows_rank_ : rank_;
    for (int d = 0; d < t.rank; ++d) t.sizes[d] = walk->stretched[d] ? 1 : sizes_[d];
    std::copy_n(walk->strides, t.rank, t.strides);
  }

  std::int32_t axis() const { return rows_rank_; }

 private:
  // How an array is walked: of x's dimensions, then, in place, of the merged ones, whose number
  // never passes that of the dimension being read.
  struct Walk {
    Argument argument;
    std::int64_t strides[max_dimensions];
    // Where one element is repeated along a dimension. Outputs that are sums keep it so.
    bool stretched[max_dimensions];

    void set(int d, std::int64_t stride, bool is_stretched) {
      strides[d] = stride;
      stretched[d] = is_stretched;
    }

    // Stepping once along dimension `outer` is stepping through all `size` of dimension d.
    bool merges(int outer, int d, std::int64_t size) const {
      if (stretched[outer] != stretched[d]) return false;
      if (size == 0) return strides[outer] == 0;
      return strides[outer] % size == 0 && strides[outer] / size == strides[d];
    }
  };

  // Without rows there is nothing to read, and nothing to write but gradients. An array that is not
  // walked has strides of zero, which any dimensions merge with.
  bool is_walked(const ArrayView& view) const {
    return has_elements(view) && (has_rows_ || call_.gradients != nullptr);
  }

  // An input whose stride repeats it is broadcast as well, unless a gradient has its shape.
  bool is_free_to_stretch(Argument argument) const {
    const bool is_input = argument == Argument::weight || argument == Argument::bias;
    return is_input && (call_.gradients == nullptr || !call_.gradients->dweight.present());
  }

  bool merges(int d) const {
    for (int i = 0; i < count_; ++i)
      if (!walks_[i].merges(rank_ - 1, d, call_.x.sizes[d])) return false;
    return true;
  }

  const Call& call_;
  const int axis_;
  const bool has_rows_;
  int count_ = 0;
  Walk walks_[rmsnorm::detail::count_tensors<Params>()];
  std::int64_t sizes_[max_dimensions];  // of the merged dimensions
  int rank_ = 0;
  int rows_rank_ = 0;  // merged dimensions before the normalised ones
};

// Sets the tensors and the axis of p.
template <class Params>
Status make_tensors(const Call& call, Params& p) {
  int rank = 0;
  rmsnorm::detail::for_each_tensor(p, [&](Argument argument, const auto&) {
    rank = std::max(rank, call.array(argument)->rank);
  });
  if (rank <= max_rank) {
    p.axis = call.axis;
    rmsnorm::detail::for_each_tensor(
        p, [&](Argument argument, auto& tensor) { fill(tensor, *call.array(argument)); });
    return {};
  }
  Merge<Params> merge(call);
  Status status;
  rmsnorm::detail::for_each_tensor(p, [&](Argument argument, const auto&) {
    if (status.ok()) status = merge.add(argument);
  });
  if (status.ok()) status = merge.merge();
  if (!status.ok()) return status;
  p.axis = merge.axis();
  rmsnorm::detail::for_each_tensor(
      p, [&](Argument argument, auto& tensor) { merge.write(argument, tensor); });
  return {};
}

}  // namespace

Status check_shape(const Call& call, Argument argument) {
  const ArrayView &x = call.x, &view = *call.array(argument);
  const Follows rule = follows(argument);
  const int rank = expected_rank(call, rule);
  const int stretchable = rule == Follows::broadcast ? call.first_axis() : 0;
  const int skipped = rank - view.rank;  // leading dimensions that broadcasting adds
  if (skipped < 0 || skipped > stretchable) return {Code::invalid_rank, argument};
  for (int d = skipped; d < rank; ++d) {
    const std::int64_t size = view.sizes[d - skipped];
    if (size != x.sizes[d] && !(size == 1 && d < stretchable))
      return {Code::invalid_size, argument};
  }
  return {};
}

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
                                       dweight.sizes + dweight.rank)) {
    const Status status = check_shape(call, Argument::weight);  // which decides
    return status.ok() ? Status{Code::invalid_size, Argument::dweight} : status;
  }
  p.eps = call.eps;
  p.weight_offset = call.weight_offset;
  p.partial = call.partial;
  return make_tensors(call, p);
}

}  // namespace rmsnorm::python
