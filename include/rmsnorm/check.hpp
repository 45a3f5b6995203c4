// The rules of the contract, checked: sizes, dtypes, options and aliasing. CPU and CUDA entries
// call this before they touch memory.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

#include "contract.hpp"

namespace rmsnorm {
namespace detail {

constexpr std::int64_t int64_max = std::numeric_limits<std::int64_t>::max();

// a * b for a, b >= 0, or -1 where that exceeds 64 bits.
inline std::int64_t checked_product(std::int64_t a, std::int64_t b) {
#if defined(__GNUC__)
  std::int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? -1 : product;
#else
  return a != 0 && b > int64_max / a ? -1 : a * b;
#endif
}

constexpr std::int64_t magnitude(std::int64_t a) { return a < 0 ? -a : a; }

constexpr bool is_finite(double v) { return v - v == 0.0; }

// A tensor of either constness, without a copy of its sizes and strides.
struct TensorRef {
  TensorRef() = default;
  template <class Void>
  constexpr TensorRef(const BasicTensor<Void>& t)
      : data(t.data), dtype(t.dtype), rank(t.rank), sizes(t.sizes), strides(t.strides) {}

  constexpr bool present() const { return rank >= 0; }

  const void* data;
  DType dtype;
  std::int32_t rank;
  const std::int64_t* sizes;
  const std::int64_t* strides;
};

// ---- memory extents and overlap ----

// The memory of a tensor in bytes: begin + sum of index[d] * stride[d], each stride positive, plus
// the element itself. Dimensions of size one are left out.
struct Extent {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;  // equal to begin: empty
  std::int64_t element_size = 0;
  int rank = 0;
  std::int64_t strides[max_rank];  // the first `rank` are set
  std::int64_t counts[max_rank];
};

// Of a tensor with elements. False where it reaches further than an address does.
inline bool make_extent(const TensorRef& t, Extent* e) {
  e->element_size = size_in_bytes(t.dtype);
  std::int64_t below = 0, span = e->element_size;
  for (int d = 0; d < t.rank; ++d) {
    if (t.sizes[d] == 1) continue;
    if (t.strides[d] <= -int64_max / 8 || t.strides[d] >= int64_max / 8) return false;
    const std::int64_t stride = magnitude(t.strides[d]) * e->element_size;
    const std::int64_t reach = checked_product(stride, t.sizes[d] - 1);
    if (reach < 0 || reach > int64_max / 4 - span) return false;
    span += reach;
    if (t.strides[d] < 0) below += reach;
    e->strides[e->rank] = stride;
    e->counts[e->rank] = t.sizes[d];
    ++e->rank;
  }
  const std::uintptr_t data = reinterpret_cast<std::uintptr_t>(t.data);
  e->begin = data - static_cast<std::uintptr_t>(below);
  e->end = e->begin + static_cast<std::uintptr_t>(span);
  return e->begin <= data && e->begin < e->end;
}

// Sorts by descending stride.
inline void sort_dimensions(std::int64_t* strides, std::int64_t* counts, int rank) {
  for (int i = 1; i < rank; ++i) {
    for (int j = i; j > 0 && strides[j - 1] < strides[j]; --j) {
      const std::int64_t stride = strides[j], count = counts[j];
      strides[j] = strides[j - 1];
      counts[j] = counts[j - 1];
      strides[j - 1] = stride;
      counts[j - 1] = count;
    }
  }
}

// Whether two elements may share memory: false when each stride steps over everything that the
// smaller ones reach, which holds for every view made by slicing, transposing or padding.
inline bool overlaps_itself(Extent e) {
  sort_dimensions(e.strides, e.counts, e.rank);
  std::int64_t reach = e.element_size;
  for (int d = e.rank - 1; d >= 0; --d) {
    if (e.strides[d] < reach) return true;
    reach += e.strides[d] * (e.counts[d] - 1);
  }
  return false;
}

// Searches index[d] in [0, count[d]) with target - slack <= sum of index[d] * stride[d] <= target.
// Strides descend, so that each dimension leaves few candidates; *budget bounds odd cases, and
// running out of it counts as found.
inline bool reaches(const std::int64_t* strides, const std::int64_t* counts, int rank,
                    std::int64_t target, std::int64_t slack, int* budget) {
  if (target < 0) return false;
  if (rank == 0) return target <= slack;
  if (--*budget < 0) return true;
  std::int64_t rest = 0;
  for (int d = 1; d < rank; ++d) rest += strides[d] * (counts[d] - 1);
  const std::int64_t missing = target - slack - rest;
  const std::int64_t least = missing > 0 ? (missing + strides[0] - 1) / strides[0] : 0;
  const std::int64_t limit = target / strides[0];
  const std::int64_t most = limit < counts[0] - 1 ? limit : counts[0] - 1;
  for (std::int64_t i = least; i <= most; ++i) {
    if (reaches(strides + 1, counts + 1, rank - 1, target - i * strides[0], slack, budget))
      return true;
  }
  return false;
}

// Whether any byte belongs to both. Interleaved views of one buffer (the q and k columns of a
// packed row) do not overlap although their extents do: the question is whether
//     a.begin + sum i s + p == b.begin + sum j t + q
// has a solution. Counting j and q downwards makes every term positive.
inline bool overlap(const Extent& a, const Extent& b) {
  if (a.begin == a.end || b.begin == b.end || a.end <= b.begin || b.end <= a.begin) return false;
  std::int64_t strides[2 * max_rank], counts[2 * max_rank];
  int rank = 0;
  std::int64_t target = static_cast<std::int64_t>(b.begin - a.begin) + b.element_size - 1;
  const auto add = [&](std::int64_t stride, std::int64_t count) {
    if (stride == 0) return;
    for (int d = 0; d < rank; ++d) {
      if (strides[d] == stride) {
        counts[d] += count - 1;
        return;
      }
    }
    strides[rank] = stride;
    counts[rank] = count;
    ++rank;
  };
  for (int d = 0; d < a.rank; ++d) add(a.strides[d], a.counts[d]);
  for (int d = 0; d < b.rank; ++d) {
    add(b.strides[d], b.counts[d]);
    target += b.strides[d] * (b.counts[d] - 1);
  }
  sort_dimensions(strides, counts, rank);
  int budget = 4096;
  return reaches(strides, counts, rank, target, a.element_size + b.element_size - 2, &budget);
}

// The same elements at the same places: element i of one is element i of the other.
inline bool exact_alias(const TensorRef& a, const TensorRef& b) {
  if (a.data != b.data || size_in_bytes(a.dtype) != size_in_bytes(b.dtype)) return false;
  for (int d = 0; d < a.rank; ++d) {
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

// ---- tensors ----

inline Status check_tensor(const TensorRef& t, Argument argument, Extent* extent) {
  if (!is_valid(t.dtype)) return {Code::invalid_dtype, argument};
  if (t.rank > max_rank) return {Code::invalid_rank, argument};
  // Sizes of zero are left out, so that products of some dimensions are in range too; 2^59 elements
  // of any dtype, and padding to whole vectors, are within 64 bits.
  constexpr std::int64_t most = std::int64_t{1} << 59;
  std::int64_t count = 1;
  bool empty = false;
  for (int d = 0; d < t.rank; ++d) {
    if (t.sizes[d] < 0) return {Code::invalid_size, argument};
    empty = empty || t.sizes[d] == 0;
    if (t.sizes[d] != 0) count = checked_product(count, t.sizes[d]);
    if (count < 0 || count > most) return {Code::invalid_size, argument};
  }
  if (empty) return {};
  if (t.data == nullptr) return {Code::null_data, argument};
  if (!make_extent(t, extent)) return {Code::invalid_size, argument};
  return {};
}

// First normalised dimension of x, or -1 for an axis outside of its rank.
constexpr int first_axis(const TensorRef& x, std::int32_t axis) {
  return axis >= -x.rank && axis < x.rank ? (axis < 0 ? axis + x.rank : axis) : -1;
}

inline bool sizes_equal(const TensorRef& a, const TensorRef& b, int rank) {
  for (int d = 0; d < rank; ++d) {
    if (a.sizes[d] != b.sizes[d]) return false;
  }
  return true;
}

// Tensors, present or not, whose sizes are the first `rank` ones of another.
struct SizedLike {
  const TensorRef& tensor;
  Argument argument;
  int rank;
};
inline Status check_sizes(const TensorRef& x, std::initializer_list<SizedLike> tensors) {
  for (const SizedLike& s : tensors) {
    if (!s.tensor.present()) continue;
    if (s.tensor.rank != s.rank) return {Code::invalid_rank, s.argument};
    if (!sizes_equal(x, s.tensor, s.rank)) return {Code::invalid_size, s.argument};
  }
  return {};
}

// weight and bias: the normalised axes of x exactly, leading dimensions broadcast.
inline Status check_broadcast(const TensorRef& x, int axis, const TensorRef& t, Argument argument) {
  if (t.rank < x.rank - axis || t.rank > x.rank) return {Code::invalid_rank, argument};
  const int skipped = x.rank - t.rank;
  for (int d = 0; d < t.rank; ++d) {
    const std::int64_t size = x.sizes[d + skipped];
    const bool fits = t.sizes[d] == size || (t.sizes[d] == 1 && d + skipped < axis);
    if (!fits) return {Code::invalid_size, argument};
  }
  return {};
}

// Tensors of an operation with their extents, checked against each other as they are added.
class TensorList {
 public:
  // `t` may be absent.
  Status add(const TensorRef& t, Argument argument) {
    if (!t.present()) return {};
    Entry& entry = entries_[count_];
    const Status status = check_tensor(t, argument, &entry.extent);
    if (!status.ok()) return status;
    entry.tensor = t;
    entry.argument = argument;
    ++count_;
    return {};
  }

  // The output must not share memory with itself or with any other tensor; the inputs `aliases` may
  // be exactly the output.
  Status check_output(Argument output, std::initializer_list<Argument> aliases = {}) const {
    const Entry* out = find(output);
    if (out == nullptr) return {};
    if (overlaps_itself(out->extent)) return {Code::self_overlap, output};
    for (int i = 0; i < count_; ++i) {
      const Entry& other = entries_[i];
      if (&other == out || !overlap(out->extent, other.extent)) continue;
      bool may_alias = false;
      for (const Argument alias : aliases) may_alias = may_alias || alias == other.argument;
      if (!may_alias || !exact_alias(out->tensor, other.tensor)) return {Code::overlap, output};
    }
    return {};
  }

 private:
  struct Entry {
    TensorRef tensor;
    Argument argument;
    Extent extent;
  };

  const Entry* find(Argument argument) const {
    for (int i = 0; i < count_; ++i) {
      if (entries_[i].argument == argument) return &entries_[i];
    }
    return nullptr;
  }

  Entry entries_[12];
  int count_ = 0;
};

inline bool is_statistic(DType t) { return t == DType::f32 || t == DType::f64; }

inline bool is_f64(const TensorRef& t) { return t.present() && t.dtype == DType::f64; }

// The options that forward and backward share.
inline Status check_options(double eps, double weight_offset, bool has_weight, double partial,
                            bool has_mean_square) {
  if (!(eps >= 0.0) || !is_finite(eps)) return {Code::invalid_value, Argument::eps};
  if (!is_finite(weight_offset)) return {Code::invalid_value, Argument::weight_offset};
  if (weight_offset != 0.0 && !has_weight) return {Code::unexpected, Argument::weight_offset};
  if (!(partial > 0.0 && partial <= 1.0)) return {Code::invalid_value, Argument::partial};
  if (partial < 1.0 && has_mean_square) return {Code::unexpected, Argument::partial};
  return {};
}

}  // namespace detail

// The number of rows of x: the product of the sizes before its normalised axes. x and axis are
// valid.
inline std::int64_t row_count(const ConstTensor& x, std::int32_t axis) {
  std::int64_t rows = 1;
  for (int d = 0; d < detail::first_axis(x, axis); ++d) rows *= x.sizes[d];
  return rows;
}

// double as soon as one of the tensors with n elements a row is double.
inline DType compute_type(const ForwardParams& p) {
  using detail::is_f64;
  const bool f64 = is_f64(p.x) || is_f64(p.residual) || is_f64(p.weight) || is_f64(p.bias) ||
                   is_f64(p.y) || is_f64(p.residual_out);
  return f64 ? DType::f64 : DType::f32;
}
inline DType compute_type(const BackwardParams& p) {
  using detail::is_f64;
  const bool f64 = is_f64(p.dy) || is_f64(p.x) || is_f64(p.residual) || is_f64(p.weight) ||
                   is_f64(p.d_residual) || is_f64(p.dx) || is_f64(p.dweight) || is_f64(p.dbias);
  return f64 ? DType::f64 : DType::f32;
}

// What forward() would refuse, without computing anything.
inline Status check(const ForwardParams& p) {
  using detail::check_broadcast;
  if (!p.x.present()) return {Code::missing, Argument::x};
  if (!p.y.present()) return {Code::missing, Argument::y};
  if (p.x.rank < 1) return {Code::invalid_rank, Argument::x};
  if (p.x.rank > max_rank) return {Code::invalid_rank, Argument::x};
  const int axis = detail::first_axis(p.x, p.axis);
  if (axis < 0) return {Code::invalid_value, Argument::axis};

  const detail::TensorRef x(p.x), residual(p.residual), mean_square(p.mean_square);
  const detail::TensorRef y(p.y), residual_out(p.residual_out), rstd(p.rstd);
  detail::TensorList tensors;
  Status status;
  const auto failed = [&status](Status s) {
    status = s;
    return !s.ok();
  };
  if (failed(tensors.add(x, Argument::x)) || failed(tensors.add(residual, Argument::residual)) ||
      failed(tensors.add(p.weight, Argument::weight)) ||
      failed(tensors.add(p.bias, Argument::bias)) ||
      failed(tensors.add(mean_square, Argument::mean_square)) ||
      failed(tensors.add(y, Argument::y)) ||
      failed(tensors.add(residual_out, Argument::residual_out)) ||
      failed(tensors.add(rstd, Argument::rstd))) {
    return status;
  }

  if (failed(detail::check_sizes(x, {{residual, Argument::residual, x.rank},
                                     {y, Argument::y, x.rank},
                                     {residual_out, Argument::residual_out, x.rank},
                                     {rstd, Argument::rstd, axis},
                                     {mean_square, Argument::mean_square, axis}}))) {
    return status;
  }
  if (p.weight.present() && failed(check_broadcast(p.x, axis, p.weight, Argument::weight)))
    return status;
  if (p.bias.present() && failed(check_broadcast(p.x, axis, p.bias, Argument::bias))) return status;

  if (p.mean_square.present() && !detail::is_statistic(p.mean_square.dtype)) {
    return {Code::invalid_dtype, Argument::mean_square};
  }
  if (rstd.present() && rstd.dtype != compute_type(p)) return {Code::invalid_dtype, Argument::rstd};
  if (residual_out.present() && !p.residual.present()) {
    return {Code::unexpected, Argument::residual_out};
  }

  if (failed(detail::check_options(p.eps, p.weight_offset, p.weight.present(), p.partial,
                                   p.mean_square.present()))) {
    return status;
  }
  if (static_cast<std::int32_t>(p.rounding) < 0 || p.rounding > Rounding::rstd) {
    return {Code::invalid_value, Argument::rounding};
  }

  if (failed(tensors.check_output(Argument::y, {Argument::x, Argument::residual})) ||
      failed(tensors.check_output(Argument::residual_out, {Argument::x, Argument::residual})) ||
      failed(tensors.check_output(Argument::rstd))) {
    return status;
  }
  return {};
}

inline Status check(const MeanSquareParams& p) {
  if (!p.x.present()) return {Code::missing, Argument::x};
  if (!p.mean_square.present()) return {Code::missing, Argument::mean_square};
  if (p.x.rank < 1 || p.x.rank > max_rank) return {Code::invalid_rank, Argument::x};
  const int axis = detail::first_axis(p.x, p.axis);
  if (axis < 0) return {Code::invalid_value, Argument::axis};
  const detail::TensorRef out(p.mean_square);
  detail::TensorList tensors;
  Status status = tensors.add(p.x, Argument::x);
  if (status.ok()) status = tensors.add(out, Argument::mean_square);
  if (!status.ok()) return status;
  if (out.rank != axis) return {Code::invalid_rank, Argument::mean_square};
  if (!detail::sizes_equal(p.x, out, axis)) return {Code::invalid_size, Argument::mean_square};
  if (!detail::is_statistic(out.dtype)) return {Code::invalid_dtype, Argument::mean_square};
  if (!(p.partial > 0.0 && p.partial <= 1.0)) return {Code::invalid_value, Argument::partial};
  return tensors.check_output(Argument::mean_square);
}

// What backward() would refuse of the tensors and options. How large the workspace must be is for
// the CPU and for CUDA to say.
inline Status check(const BackwardParams& p) {
  if (!p.x.present()) return {Code::missing, Argument::x};
  if (!p.dy.present()) return {Code::missing, Argument::dy};
  if (!p.dx.present()) return {Code::missing, Argument::dx};
  if (p.x.rank < 1 || p.x.rank > max_rank) return {Code::invalid_rank, Argument::x};
  const int axis = detail::first_axis(p.x, p.axis);
  if (axis < 0) return {Code::invalid_value, Argument::axis};

  const detail::TensorRef x(p.x), dy(p.dy), residual(p.residual), weight(p.weight), rstd(p.rstd);
  const detail::TensorRef mean_square(p.mean_square), d_residual(p.d_residual), dx(p.dx);
  const detail::TensorRef dweight(p.dweight), dbias(p.dbias), d_mean_square(p.d_mean_square);
  detail::TensorList tensors;
  Status status;
  const auto failed = [&status](Status s) {
    status = s;
    return !s.ok();
  };
  if (failed(tensors.add(x, Argument::x)) || failed(tensors.add(dy, Argument::dy)) ||
      failed(tensors.add(residual, Argument::residual)) ||
      failed(tensors.add(weight, Argument::weight)) || failed(tensors.add(rstd, Argument::rstd)) ||
      failed(tensors.add(mean_square, Argument::mean_square)) ||
      failed(tensors.add(d_residual, Argument::d_residual)) ||
      failed(tensors.add(dx, Argument::dx)) || failed(tensors.add(dweight, Argument::dweight)) ||
      failed(tensors.add(dbias, Argument::dbias)) ||
      failed(tensors.add(d_mean_square, Argument::d_mean_square))) {
    return status;
  }

  if (failed(detail::check_sizes(x, {{dy, Argument::dy, x.rank},
                                     {residual, Argument::residual, x.rank},
                                     {d_residual, Argument::d_residual, x.rank},
                                     {dx, Argument::dx, x.rank},
                                     {rstd, Argument::rstd, axis},
                                     {mean_square, Argument::mean_square, axis},
                                     {d_mean_square, Argument::d_mean_square, axis}}))) {
    return status;
  }
  if (weight.present() && failed(detail::check_broadcast(x, axis, weight, Argument::weight))) {
    return status;
  }
  if (dweight.present() && !weight.present()) return {Code::unexpected, Argument::dweight};
  if (dweight.present() && dweight.rank != weight.rank) {
    return {Code::invalid_rank, Argument::dweight};
  }
  if (dweight.present() && !detail::sizes_equal(weight, dweight, weight.rank)) {
    return {Code::invalid_size, Argument::dweight};
  }
  if (dbias.present() && failed(detail::check_broadcast(x, axis, dbias, Argument::dbias))) {
    return status;
  }
  if (d_mean_square.present() && !mean_square.present()) {
    return {Code::unexpected, Argument::d_mean_square};
  }
  for (const auto& s : {detail::SizedLike{rstd, Argument::rstd, axis},
                        detail::SizedLike{mean_square, Argument::mean_square, axis},
                        detail::SizedLike{d_mean_square, Argument::d_mean_square, axis}}) {
    if (s.tensor.present() && !detail::is_statistic(s.tensor.dtype)) {
      return {Code::invalid_dtype, s.argument};
    }
  }
  if (failed(detail::check_options(p.eps, p.weight_offset, p.weight.present(), p.partial,
                                   p.mean_square.present())) ||
      failed(tensors.check_output(
          Argument::dx, {Argument::dy, Argument::x, Argument::residual, Argument::d_residual})) ||
      failed(tensors.check_output(Argument::dweight)) ||
      failed(tensors.check_output(Argument::dbias)) ||
      failed(tensors.check_output(Argument::d_mean_square))) {
    return status;
  }
  return {};
}

// Whether p.workspace has `needed` bytes and shares memory with no tensor of p, which was checked.
inline Status check_workspace(const BackwardParams& p, std::int64_t needed) {
  if (needed == 0) return {};
  if (p.workspace_bytes < needed) return {Code::invalid_size, Argument::workspace};
  if (p.workspace == nullptr) return {Code::null_data, Argument::workspace};
  if (reinterpret_cast<std::uintptr_t>(p.workspace) % 64 != 0) {
    return {Code::invalid_value, Argument::workspace};
  }
  Tensor memory = vector(static_cast<float*>(p.workspace), needed / 4);
  detail::TensorList tensors;
  Status status = tensors.add(memory, Argument::workspace);
  for (const auto& s :
       {detail::TensorRef(p.x), detail::TensorRef(p.dy), detail::TensorRef(p.residual),
        detail::TensorRef(p.weight), detail::TensorRef(p.rstd), detail::TensorRef(p.mean_square),
        detail::TensorRef(p.d_residual), detail::TensorRef(p.dx), detail::TensorRef(p.dweight),
        detail::TensorRef(p.dbias), detail::TensorRef(p.d_mean_square)}) {
    if (status.ok()) status = tensors.add(s, Argument::none);
  }
  return status.ok() ? tensors.check_output(Argument::workspace) : status;
}

}  // namespace rmsnorm
