#include "call.hpp"

namespace rmsnorm::python {

const ArrayView* Call::array(Argument argument) const {
  switch (argument) {
    case Argument::x: return &x;
    case Argument::residual: return &residual;
    case Argument::weight: return &weight;
    case Argument::bias: return &bias;
    case Argument::mean_square: return &mean_square;
    case Argument::y: return &y;
    case Argument::residual_out: return &residual_out;
    case Argument::rstd: return &rstd;
    default: return nullptr;
  }
}

const char* Call::python_name(Argument argument) const {
  const bool is_out =
      argument == Argument::y || (argument == Argument::mean_square && mean_square_is_output);
  return is_out ? "out" : name(argument);
}

}  // namespace rmsnorm::python
