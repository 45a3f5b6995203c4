// The operations of the Python module. Every argument comes as the caller's object; the signatures
// that users see are in module.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace rmsnorm::python {

namespace nb = nanobind;

nb::object rms_norm(nb::handle x, nb::handle weight, nb::handle bias, nb::handle eps,
                    nb::handle axis, nb::handle weight_offset, nb::handle rounding,
                    nb::handle partial, nb::handle out, nb::handle out_dtype,
                    nb::handle return_rstd, nb::handle stream);

nb::object add_rms_norm(nb::handle x, nb::handle residual, nb::handle weight, nb::handle bias,
                        nb::handle eps, nb::handle axis, nb::handle weight_offset,
                        nb::handle rounding, nb::handle round_residual, nb::handle out,
                        nb::handle residual_out, nb::handle return_rstd, nb::handle stream);

nb::object rms_norm_backward(nb::handle dy, nb::handle x, nb::handle weight, nb::handle rstd,
                             nb::handle eps, nb::handle axis, nb::handle weight_offset,
                             nb::handle rounding, nb::handle partial, nb::handle residual,
                             nb::handle mean_square, nb::handle d_residual, nb::handle has_bias,
                             nb::handle needs_dweight, nb::handle dx_out, nb::handle dweight_out,
                             nb::handle dbias_out, nb::handle stream);

nb::object mean_square(nb::handle x, nb::handle out, nb::handle stream);

nb::object rms_norm_apply(nb::handle x, nb::handle mean_square, nb::handle weight, nb::handle bias,
                          nb::handle eps, nb::handle axis, nb::handle weight_offset,
                          nb::handle rounding, nb::handle out, nb::handle out_dtype,
                          nb::handle stream);

}  // namespace rmsnorm::python
