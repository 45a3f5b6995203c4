#include "call.hpp"

#include <iterator>

namespace rmsnorm::python {
namespace {

constexpr Argument forward_arguments[] = {
    Argument::x,           Argument::residual, Argument::weight,      Argument::bias,
    Argument::mean_square, Argument::y,        Argument::residual_out};

constexpr Argument backward_arguments[] = {
    Argument::x,       Argument::dy,          Argument::residual,   Argument::weight,
    Argument::rstd,    Argument::mean_square, Argument::d_residual, Argument::dx,
    Argument::dweight, Argument::dbias};

}  // namespace

ArgumentRange Call::array_arguments() const {
  if (gradients != nullptr) return {std::begin(backward_arguments), std::end(backward_arguments)};
  return {std::begin(forward_arguments), std::end(forward_arguments)};
}

const char* Call::python_name(Argument argument) const {
  switch (argument) {
    case Argument::y: return "out";
    case Argument::mean_square: return mean_square_is_output ? "out" : name(argument);
    case Argument::dx: return "dx_out";
    case Argument::dweight: return "dweight_out";
    case Argument::dbias: return "dbias_out";
    default: return name(argument);
  }
}

}  // namespace rmsnorm::python
