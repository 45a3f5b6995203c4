// The rules of the contract, checked: sizes, dtypes, options and aliasing. CPU and CUDA entries
// call this before they touch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

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

// The same, or the largest number: a product with a zero is zero whatever its order.
inline std::int64_t saturated_product(std::int64_t a, std::int64_t b) {
  const std::int64_t product = checked_product(a, b);
  return product < 0 ? int64_max : product;
}

// a / b, rounded up, for a >= 0 and b > 0.
constexpr std::int64_t quotient_rounded_up(std::int64_t a, std::int64_t b) {
  return a / b + (a % b != 0 ? 1 : 0);
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
// the element itself. Dimensions of size one are left out, and all where there are no elements.
struct Extent {
  std::uintptr_t begin;
  std::uintptr_t end;  // equal to begin: empty
  std::int64_t element_size;
  int rank;
  // Each stride steps over all that the dimensions after it reach, as in every tensor whose
  // dimensions are in the order of its memory: no two elements share any.
  bool nested;
  std::int64_t strides[max_rank];  // the first `rank` are set, the innermost dimension's first
  std::int64_t counts[max_rank];
};

// Adds a dimension of two or more elements outside of those before. False where the tensor then
// reaches further than an address does.
inline bool add_dimension(std::int64_t size, std::int64_t stride, std::int64_t* below,
                          std::int64_t* span, Extent* e) {
  if (stride <= -int64_max / 8 || stride >= int64_max / 8) return false;
  const std::int64_t bytes = magnitude(stride) * e->element_size;
  const std::int64_t reach = checked_product(bytes, size - 1);
  if (reach < 0 || reach > int64_max / 4 - *span) return false;
  e->nested = e->nested && bytes >= *span;
  *span += reach;
  if (stride < 0) *below += reach;
  e->strides[e->rank] = bytes;
  e->counts[e->rank] = size;
  ++e->rank;
  return true;
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

// Whether one ends where or before the other begins, as tensors that are no views of one memory do.
inline bool are_apart(const Extent& a, const Extent& b) {
  return a.end <= b.begin || b.end <= a.begin || a.begin == a.end || b.begin == b.end;
}

// Whether any byte belongs to both, of two that are not apart. Interleaved views of one buffer (the
// q and k columns of a packed row) do not overlap although their extents do: the question is
// whether
//     a.begin + sum i s + p == b.begin + sum j t + q
// has a solution. Counting j and q downwards makes every term positive.
inline bool overlap(const Extent& a, const Extent& b) {
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

// Of any dtype and padded to whole vectors, their bytes are within 64 bits.
constexpr std::int64_t max_elements = std::int64_t{1} << 59;

// Checks of one argument return a code, which fits in a register: gcc 12 builds a Status in memory
// from halves and loads it whole, and each of those loads waits 12 cycles.

inline Code check_tensor(const TensorRef& t, Extent* e) {
  if (!is_valid(t.dtype)) return Code::invalid_dtype;
  if (t.rank > max_rank) return Code::invalid_rank;
  // Where a size is zero the others may be anything: nothing is there to be addressed.
  e->element_size = size_in_bytes(t.dtype);
  e->rank = 0;
  e->nested = true;
  std::int64_t count = 1, below = 0, span = e->element_size;
  bool empty = false, addressable = true;
  for (int d = t.rank - 1; d >= 0; --d) {
    const std::int64_t size = t.sizes[d];
    if (size == 1) continue;
    if (size < 0) return Code::invalid_size;
    if (size == 0) {
      empty = true;
      continue;
    }
    count = saturated_product(count, size);
    addressable = addressable && add_dimension(size, t.strides[d], &below, &span, e);
  }
  const std::uintptr_t data = reinterpret_cast<std::uintptr_t>(t.data);
  if (empty) {
    e->begin = e->end = data;
    e->rank = 0;
    e->nested = true;
    return Code::ok;
  }
  if (count > max_elements) return Code::too_many_elements;
  if (t.data == nullptr) return Code::null_data;
  e->begin = data - static_cast<std::uintptr_t>(below);
  e->end = e->begin + static_cast<std::uintptr_t>(span);
  addressable = addressable && e->begin <= data && e->begin < e->end;
  return addressable ? Code::ok : Code::unaddressable;
}

// First normalised dimension of x, or -1 for an axis outside of its rank.
constexpr int first_axis(const TensorRef& x, std::int32_t axis) {
  return axis >= -x.rank && axis < x.rank ? (axis < 0 ? axis + x.rank : axis) : -1;
}

template <class A, class B>
bool sizes_equal(const A& a, const B& b, int rank) {
  for (int d = 0; d < rank; ++d) {
    if (a.sizes[d] != b.sizes[d]) return false;
  }
  return true;
}

// A tensor, present or not, whose sizes are the first `rank` ones of x.
template <class Void>
Code check_sizes(const TensorRef& x, const BasicTensor<Void>& t, int rank) {
  if (!t.present()) return Code::ok;
  if (t.rank != rank) return Code::invalid_rank;
  return sizes_equal(x, t, rank) ? Code::ok : Code::invalid_size;
}

// weight and bias, present or not: the normalised axes of x exactly, leading dimensions broadcast.
template <class Void>
Code check_broadcast(const TensorRef& x, int axis, const BasicTensor<Void>& t) {
  if (!t.present()) return Code::ok;
  if (t.rank < x.rank - axis || t.rank > x.rank) return Code::invalid_rank;
  const int skipped = x.rank - t.rank;
  for (int d = 0; d < t.rank; ++d) {
    const std::int64_t size = x.sizes[d + skipped];
    const bool fits = t.sizes[d] == size || (t.sizes[d] == 1 && d + skipped < axis);
    if (!fits) return Code::invalid_size;
  }
  return Code::ok;
}

// Calls visit(argument, tensor) for every tensor, present or not, of the parameters of an
// operation, in the order in which they are checked.
template <class Params, class Visit>
constexpr void for_each_tensor(Params& p, Visit visit) {
  using Operation = typename std::remove_const<Params>::type;
  visit(Argument::x, p.x);
  if constexpr (std::is_same<Operation, BackwardParams>::value) {
    visit(Argument::dy, p.dy);
    visit(Argument::residual, p.residual);
    visit(Argument::weight, p.weight);
    visit(Argument::rstd, p.rstd);
    visit(Argument::mean_square, p.mean_square);
    visit(Argument::d_residual, p.d_residual);
    visit(Argument::dx, p.dx);
    visit(Argument::dweight, p.dweight);
    visit(Argument::dbias, p.dbias);
    visit(Argument::d_mean_square, p.d_mean_square);
  } else if constexpr (std::is_same<Operation, ForwardParams>::value) {
    visit(Argument::residual, p.residual);
    visit(Argument::weight, p.weight);
    visit(Argument::bias, p.bias);
    visit(Argument::mean_square, p.mean_square);
    visit(Argument::y, p.y);
    visit(Argument::residual_out, p.residual_out);
    visit(Argument::rstd, p.rstd);
  } else {
    visit(Argument::mean_square, p.mean_square);
  }
}

template <class Params>
constexpr std::size_t count_tensors() {
  const Params p{};
  std::size_t count = 0;
  for_each_tensor(p, [&count](Argument, const auto&) { ++count; });
  return count;
}
static_assert(count_tensors<ForwardParams>() * sizeof(Tensor) == offsetof(ForwardParams, axis) &&
                  count_tensors<MeanSquareParams>() * sizeof(Tensor) ==
                      offsetof(MeanSquareParams, axis) &&
                  count_tensors<BackwardParams>() * sizeof(Tensor) ==
                      offsetof(BackwardParams, workspace),
              "no tensor is left out");

// The tensors of an operation with their extents, checked against each other, and the status of the
// first check that failed. All of them are added at once, so that each has its place.
template <class Params>
class TensorList {
 public:
  const Status& status() const { return status_; }

  // True, and the status set, for every code but ok.
  bool fails(Code code, Argument argument) {
    if (code == Code::ok) return false;
    status_ = {code, argument};
    return true;
  }

  bool refuses_tensor(const Params& p) {
    bool refused = false;
    for_each_tensor(p, [&](Argument argument, const auto& t) {
      refused = refused || this->refuses(t, argument);
    });
    return refused;
  }

  // The output must not share memory with itself or with any other tensor; the inputs `aliases` may
  // be exactly the output.
  bool refuses_output(Argument output, std::initializer_list<Argument> aliases = {}) {
    const Entry* out = find(output);
    return out != nullptr && fails(check_output(*out, aliases), output);
  }

  // Memory that is no tensor of the operation must not share any with those that are.
  Code check_memory(const Tensor& memory) const {
    Entry entry;
    const Code code = check_tensor(memory, &entry.extent);
    return code == Code::ok ? check_output(entry, {}) : code;
  }

 private:
  struct Entry {
    TensorRef tensor;
    Argument argument;
    Extent extent;
  };

  // `t` may be absent, and most are: that is seen before a TensorRef is made.
  template <class Void>
  bool refuses(const BasicTensor<Void>& t, Argument argument) {
    return t.present() && fails(add(t, argument), argument);
  }

  Code add(const TensorRef& t, Argument argument) {
    Entry& entry = entries_[count_];
    const Code code = check_tensor(t, &entry.extent);
    if (code != Code::ok) return code;
    entry.tensor = t;
    entry.argument = argument;
    ++count_;
    return Code::ok;
  }

  Code check_output(const Entry& out, std::initializer_list<Argument> aliases) const {
    const Extent& extent = out.extent;
    if (!extent.nested && overlaps_itself(extent)) return Code::self_overlap;
    for (int i = 0; i < count_; ++i) {
      const Entry& other = entries_[i];
      if (&other == &out || are_apart(extent, other.extent)) continue;
      bool may_alias = false;
      for (const Argument alias : aliases) may_alias = may_alias || alias == other.argument;
      if (may_alias && exact_alias(out.tensor, other.tensor)) continue;
      if (overlap(extent, other.extent)) return Code::overlap;
    }
    return Code::ok;
  }

  const Entry* find(Argument argument) const {
    for (int i = 0; i < count_; ++i) {
      if (entries_[i].argument == argument) return &entries_[i];
    }
    return nullptr;
  }

  Entry entries_[count_tensors<Params>()];
  int count_ = 0;
  Status status_;
};

inline bool is_statistic(DType t) { return t == DType::f32 || t == DType::f64; }

template <class Void>
bool is_f64(const BasicTensor<Void>& t) {
  return t.present() && t.dtype == DType::f64;
}

// The options that forward and backward share; `argument` is the one that was looked at last.
inline Code check_options(double eps, double weight_offset, bool has_weight, double partial,
                          bool has_mean_square, Argument* argument) {
  *argument = Argument::eps;
  if (!(eps >= 0.0) || !is_finite(eps)) return Code::invalid_value;
  *argument = Argument::weight_offset;
  if (!is_finite(weight_offset)) return Code::invalid_value;
  if (weight_offset != 0.0 && !has_weight) return Code::unexpected;
  *argument = Argument::partial;
  if (!(partial > 0.0 && partial <= 1.0)) return Code::invalid_value;
  return partial < 1.0 && has_mean_square ? Code::unexpected : Code::ok;
}

}  // namespace detail

// The number of rows of x: the product of the sizes before its normalised axes. x and axis are
// valid. Rows without elements may be more than 2^63 - 1, which is then the number.
inline std::int64_t row_count(const ConstTensor& x, std::int32_t axis) {
  std::int64_t rows = 1;
  for (int d = 0; d < detail::first_axis(x, axis); ++d) {
    rows = detail::saturated_product(rows, x.sizes[d]);
  }
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

namespace detail {

// What the contract asks of dtypes and options beyond what it asks of every tensor; `about` is what
// was looked at last.
inline Code check_rules(const ForwardParams& p, Argument* about) {
  *about = Argument::mean_square;
  if (p.mean_square.present() && !is_statistic(p.mean_square.dtype)) return Code::invalid_dtype;
  *about = Argument::rstd;
  if (p.rstd.present() && p.rstd.dtype != compute_type(p)) return Code::invalid_dtype;
  *about = Argument::residual_out;
  if (p.residual_out.present() && !p.residual.present()) return Code::unexpected;
  const Code code = check_options(p.eps, p.weight_offset, p.weight.present(), p.partial,
                                  p.mean_square.present(), about);
  if (code != Code::ok) return code;
  *about = Argument::rounding;
  const bool known = static_cast<std::int32_t>(p.rounding) >= 0 && p.rounding <= Rounding::rstd;
  return known ? Code::ok : Code::invalid_value;
}

inline Code check_rules(const MeanSquareParams& p, Argument* about) {
  *about = Argument::mean_square;
  if (!is_statistic(p.mean_square.dtype)) return Code::invalid_dtype;
  *about = Argument::partial;
  return p.partial > 0.0 && p.partial <= 1.0 ? Code::ok : Code::invalid_value;
}

}  // namespace detail

// What forward() would refuse, without computing anything.
inline Status check(const ForwardParams& p) {
  using detail::check_broadcast;
  using detail::check_sizes;
  if (!p.x.present()) return {Code::missing, Argument::x};
  if (!p.y.present()) return {Code::missing, Argument::y};
  if (p.x.rank < 1) return {Code::invalid_rank, Argument::x};
  if (p.x.rank > max_rank) return {Code::invalid_rank, Argument::x};
  const int axis = detail::first_axis(p.x, p.axis);
  if (axis < 0) return {Code::invalid_value, Argument::axis};

  const detail::TensorRef x(p.x);
  detail::TensorList<ForwardParams> tensors;
  if (tensors.refuses_tensor(p)) return tensors.status();

  if (tensors.fails(check_sizes(x, p.residual, x.rank), Argument::residual) ||
      tensors.fails(check_sizes(x, p.y, x.rank), Argument::y) ||
      tensors.fails(check_sizes(x, p.residual_out, x.rank), Argument::residual_out) ||
      tensors.fails(check_sizes(x, p.rstd, axis), Argument::rstd) ||
      tensors.fails(check_sizes(x, p.mean_square, axis), Argument::mean_square)) {
    return tensors.status();
  }
  if (tensors.fails(check_broadcast(x, axis, p.weight), Argument::weight)) return tensors.status();
  if (tensors.fails(check_broadcast(x, axis, p.bias), Argument::bias)) return tensors.status();

  Argument about;
  const Code code = detail::check_rules(p, &about);
  if (tensors.fails(code, about)) return tensors.status();

  if (tensors.refuses_output(Argument::y, {Argument::x, Argument::residual}) ||
      tensors.refuses_output(Argument::residual_out, {Argument::x, Argument::residual}) ||
      tensors.refuses_output(Argument::rstd)) {
    return tensors.status();
  }
  return {};
}

inline Status check(const MeanSquareParams& p) {
  if (!p.x.present()) return {Code::missing, Argument::x};
  if (!p.mean_square.present()) return {Code::missing, Argument::mean_square};
  if (p.x.rank < 1 || p.x.rank > max_rank) return {Code::invalid_rank, Argument::x};
  const int axis = detail::first_axis(p.x, p.axis);
  if (axis < 0) return {Code::invalid_value, Argument::axis};
  const Tensor& out = p.mean_square;
  detail::TensorList<MeanSquareParams> tensors;
  if (tensors.refuses_tensor(p)) return tensors.status();
  if (out.rank != axis) return {Code::invalid_rank, Argument::mean_square};
  if (!detail::sizes_equal(p.x, out, axis)) return {Code::invalid_size, Argument::mean_square};
  Argument about;
  const Code code = detail::check_rules(p, &about);
  if (tensors.fails(code, about)) return tensors.status();
  tensors.refuses_output(Argument::mean_square);
  return tensors.status();
}

namespace detail {

// check(p), which leaves the tensors in a new list that check_workspace then takes.
inline Status check(const BackwardParams& p, TensorList<BackwardParams>& tensors) {
  if (!p.x.present()) return {Code::missing, Argument::x};
  if (!p.dy.present()) return {Code::missing, Argument::dy};
  if (!p.dx.present()) return {Code::missing, Argument::dx};
  if (p.x.rank < 1 || p.x.rank > max_rank) return {Code::invalid_rank, Argument::x};
  const int axis = first_axis(p.x, p.axis);
  if (axis < 0) return {Code::invalid_value, Argument::axis};

  const TensorRef x(p.x), weight(p.weight);
  if (tensors.refuses_tensor(p)) return tensors.status();

  if (tensors.fails(check_sizes(x, p.dy, x.rank), Argument::dy) ||
      tensors.fails(check_sizes(x, p.residual, x.rank), Argument::residual) ||
      tensors.fails(check_sizes(x, p.d_residual, x.rank), Argument::d_residual) ||
      tensors.fails(check_sizes(x, p.dx, x.rank), Argument::dx) ||
      tensors.fails(check_sizes(x, p.rstd, axis), Argument::rstd) ||
      tensors.fails(check_sizes(x, p.mean_square, axis), Argument::mean_square) ||
      tensors.fails(check_sizes(x, p.d_mean_square, axis), Argument::d_mean_square)) {
    return tensors.status();
  }
  if (tensors.fails(check_broadcast(x, axis, p.weight), Argument::weight)) {
    return tensors.status();
  }
  if (p.dweight.present() && !weight.present()) return {Code::unexpected, Argument::dweight};
  if (tensors.fails(check_sizes(weight, p.dweight, weight.rank), Argument::dweight))
    return tensors.status();
  if (tensors.fails(check_broadcast(x, axis, p.dbias), Argument::dbias)) {
    return tensors.status();
  }
  if (p.d_mean_square.present() && !p.mean_square.present()) {
    return {Code::unexpected, Argument::d_mean_square};
  }
  const auto is_no_statistic = [](const auto& t) { return t.present() && !is_statistic(t.dtype); };
  if (is_no_statistic(p.rstd)) return {Code::invalid_dtype, Argument::rstd};
  if (is_no_statistic(p.mean_square)) return {Code::invalid_dtype, Argument::mean_square};
  if (is_no_statistic(p.d_mean_square)) return {Code::invalid_dtype, Argument::d_mean_square};
  Argument option;
  const Code code = check_options(p.eps, p.weight_offset, p.weight.present(), p.partial,
                                  p.mean_square.present(), &option);
  if (tensors.fails(code, option)) return tensors.status();
  if (tensors.refuses_output(
          Argument::dx, {Argument::dy, Argument::x, Argument::residual, Argument::d_residual}) ||
      tensors.refuses_output(Argument::dweight) || tensors.refuses_output(Argument::dbias) ||
      tensors.refuses_output(Argument::d_mean_square)) {
    return tensors.status();
  }
  return {};
}

// Whether the workspace has `needed` bytes and shares memory with none of the tensors, whose check
// was good.
inline Status check_workspace(const TensorList<BackwardParams>& tensors, void* workspace,
                              std::int64_t bytes, std::int64_t needed) {
  if (needed == 0) return {};
  if (bytes < needed) return {Code::invalid_size, Argument::workspace};
  if (workspace == nullptr) return {Code::null_data, Argument::workspace};
  if (reinterpret_cast<std::uintptr_t>(workspace) % 64 != 0) {
    return {Code::invalid_value, Argument::workspace};
  }
  const Code code = tensors.check_memory(vector(static_cast<float*>(workspace), needed / 4));
  return code == Code::ok ? Status{} : Status{code, Argument::workspace};
}

}  // namespace detail

// What backward() would refuse of the tensors and options. How large the workspace must be is for
// the CPU and for CUDA to say.
inline Status check(const BackwardParams& p) {
  detail::TensorList<BackwardParams> tensors;
  return detail::check(p, tensors);
}

}  // namespace rmsnorm
