#include "call.hpp"

namespace rmsnorm::python {

void require_unmoved(const Call& call) {
  call.for_each_array([](Argument, const ArrayView& view) { require_unmoved(view); });
}

void refuse_negative_bits(const Call& call) {
  call.for_each_array([](Argument, const ArrayView& view) {
    if (view.may_be_negated) refuse_negative_bit(view);
  });
  require_unmoved(call);
}

Argument Call::argument_on_cuda() const {
  for (const Argument argument : array_arguments()) {
    const ArrayView& view = *array(argument);
    if (view.present() && view.on_cuda()) return argument;
  }
  return Argument::none;
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
