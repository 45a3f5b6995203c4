// One call from Python, read: arrays as views and options as numbers, before the library's
// parameter structs are made of them. Error messages take their values from here.
#pragma once

#include <cstdint>
#include <rmsnorm/contract.hpp>

#include "array_view.hpp"

namespace rmsnorm::python {

// The arguments that a caller gives arrays for.
constexpr Argument array_arguments[] = {
    Argument::x,           Argument::residual, Argument::weight,      Argument::bias,
    Argument::mean_square, Argument::y,        Argument::residual_out};

struct Call {
  ArrayView x;
  ArrayView residual;
  ArrayView weight;
  ArrayView bias;
  ArrayView mean_square;
  ArrayView y;
  ArrayView residual_out;
  ArrayView rstd;
  bool mean_square_is_output = false;
  std::int32_t axis = -1;
  Rounding rounding = Rounding::once;
  double eps = 1e-6;
  double weight_offset = 0.0;
  double partial = 1.0;
  bool round_residual = true;

  // x has that axis; checked by require_axis.
  int first_axis() const { return axis < 0 ? axis + x.rank : axis; }

  // Null for arguments that are no array.
  const ArrayView* array(Argument argument) const;
  ArrayView* array(Argument argument) {
    return const_cast<ArrayView*>(static_cast<const Call*>(this)->array(argument));
  }

  // The argument's name in Python.
  const char* python_name(Argument argument) const;
};

}  // namespace rmsnorm::python
