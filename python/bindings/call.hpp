// One call from Python, read: arrays as views and options as numbers, before the library's
// parameter structs are made of them. Error messages take their values from here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <rmsnorm/contract.hpp>
#include <utility>

#include "array_view.hpp"
#include "frameworks.hpp"

namespace rmsnorm::python {

// Arrays that only rms_norm_backward has. Apart, since every view costs the other calls time.
struct Gradients {
  ArrayView dy;
  ArrayView d_residual;
  ArrayView dx;
  ArrayView dweight;
  ArrayView dbias;
  ArrayView d_mean_square{Dtypes::of_statistics};
};

// The arrays of a call: those that a caller gives, and the results that are allocated.
inline constexpr Argument forward_arguments[] = {
    Argument::x,           Argument::residual, Argument::weight,       Argument::bias,
    Argument::mean_square, Argument::y,        Argument::residual_out, Argument::rstd};
inline constexpr Argument backward_arguments[] = {
    Argument::x,       Argument::dy,          Argument::residual,     Argument::weight,
    Argument::rstd,    Argument::mean_square, Argument::d_residual,   Argument::dx,
    Argument::dweight, Argument::dbias,       Argument::d_mean_square};

struct ArgumentRange {
  const Argument* first;
  const Argument* last;
  const Argument* begin() const { return first; }
  const Argument* end() const { return last; }
};

struct Call {
  ArrayView x;
  ArrayView residual;
  ArrayView weight;
  ArrayView bias;
  ArrayView mean_square{Dtypes::of_statistics};
  ArrayView y;
  ArrayView residual_out;
  ArrayView rstd{Dtypes::of_statistics};
  Gradients* gradients = nullptr;
  bool mean_square_is_output = false;
  std::int32_t axis = -1;
  Rounding rounding = Rounding::once;
  double eps = 1e-6;
  double weight_offset = 0.0;
  double partial = 1.0;
  bool round_residual = true;

  // x has that axis; checked by require_rows.
  int first_axis() const { return axis < 0 ? axis + x.rank : axis; }

  // Null for arguments that are no array of this call.
  const ArrayView* array(Argument argument) const;
  ArrayView* array(Argument argument) {
    return const_cast<ArrayView*>(static_cast<const Call*>(this)->array(argument));
  }

  ArgumentRange array_arguments() const {
    if (gradients != nullptr) return {std::begin(backward_arguments), std::end(backward_arguments)};
    return {std::begin(forward_arguments), std::end(forward_arguments)};
  }

  // visit(argument, view) for each of array_arguments().
  template <class Visit>
  void for_each_array(Visit visit) const {
    visit_arrays(*this, visit);
  }
  template <class Visit>
  void for_each_array(Visit visit) {
    visit_arrays(*this, visit);
  }

  // The first array on CUDA, which decides on the device: x, or where that lies in memory of the
  // host, another one. Argument::none without any.
  Argument argument_on_cuda() const;

  // The argument's name in Python.
  const char* python_name(Argument argument) const;

 private:
  // A pack, whose arguments a compiler knows and thereby the places of their views: gcc leaves a
  // loop as one, which looks each view up, 10 instructions for every array that a call does not
  // have, in four walks.
  template <const auto& arguments, class Self, class Visit, std::size_t... i>
  static void visit_each(Self& call, Visit& visit, std::index_sequence<i...>) {
    (visit(arguments[i], *call.array(arguments[i])), ...);
  }
  template <class Self, class Visit>
  static void visit_arrays(Self& call, Visit visit) {
    if (call.gradients == nullptr) {
      visit_each<forward_arguments>(call, visit,
                                    std::make_index_sequence<std::size(forward_arguments)>());
    } else {
      visit_each<backward_arguments>(call, visit,
                                     std::make_index_sequence<std::size(backward_arguments)>());
    }
  }
};

void require_unmoved(const Call& call);
void refuse_negative_bits(const Call& call);

// The second step of reading arrays, for all of a call.
inline void read_memory(Call& call) {
  const unsigned lookups_before = foreign_lookups;
  bool may_be_negated = false;
  call.for_each_array([&](Argument, ArrayView& view) {
    if (view.pending == Pending::memory) may_be_negated |= read_memory(view);
  });
  if (may_be_negated) refuse_negative_bits(call);
  if (foreign_lookups != lookups_before) require_unmoved(call);
}

inline const ArrayView* Call::array(Argument argument) const {
  switch (argument) {
    case Argument::x: return &x;
    case Argument::residual: return &residual;
    case Argument::weight: return &weight;
    case Argument::bias: return &bias;
    case Argument::mean_square: return &mean_square;
    case Argument::y: return &y;
    case Argument::residual_out: return &residual_out;
    case Argument::rstd: return &rstd;
    default: break;
  }
  if (gradients == nullptr) return nullptr;
  switch (argument) {
    case Argument::dy: return &gradients->dy;
    case Argument::d_residual: return &gradients->d_residual;
    case Argument::dx: return &gradients->dx;
    case Argument::dweight: return &gradients->dweight;
    case Argument::dbias: return &gradients->dbias;
    case Argument::d_mean_square: return &gradients->d_mean_square;
    default: return nullptr;
  }
}

}  // namespace rmsnorm::python
