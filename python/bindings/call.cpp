#include "call.hpp"

namespace rmsnorm::python {
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
