#include "operations.hpp"

#include <optional>
#include <rmsnorm/cuda.cuh>
#include <rmsnorm/rmsnorm.hpp>

#include "call.hpp"
#include "errors.hpp"
#include "options.hpp"
#include "parameters.hpp"
#include "placement.hpp"
#include "results.hpp"
#include "threads.hpp"

namespace rmsnorm::python {
namespace {

// No derivative of a torch tensor may be lost.
void require_no_derivatives(const Call& call) {
  bool from_torch = false;
  for (const Argument argument : array_arguments)
    from_torch = from_torch || call.array(argument)->framework == Framework::torch;
  if (!from_torch) return;
  refuse_tracing();
  if (!torch_tangents_exist()) return;
  for (const Argument argument : array_arguments) {
    const ArrayView& view = *call.array(argument);
    if (view.present() && view.framework == Framework::torch)
      refuse_lost_tangent(view.source, call.python_name(argument));
  }
}

// What concerns all arrays of a call at once.
Placement require_usable(Call& call, nb::handle stream) {
  const Placement placement = place(call, stream);
  require_no_derivatives(call);
  return placement;
}

// The shapes of results are taken from x and its axis before the library checks the call.
void require_axis(const Call& call) {
  if (call.x.rank == 0) raise_status({Code::invalid_rank, Argument::x}, call);
  if (call.axis < -call.x.rank || call.axis >= call.x.rank)
    raise_status({Code::invalid_value, Argument::axis}, call);
}

double element_count(const ArrayView& view) {
  double count = 1;
  for (int d = 0; d < view.rank; ++d) count *= static_cast<double>(view.sizes[d]);
  return count;
}

// What the operation reads and writes for each element of x, times the elements. Weights stay in
// cache and statistics are one number a row.
double bytes_moved(const Call& call) {
  std::int64_t bytes = 0;
  for (const ArrayView* view : {&call.x, &call.residual, &call.y, &call.residual_out})
    if (view->present()) bytes += size_in_bytes(view->dtype);
  return static_cast<double>(bytes) * element_count(call.x);
}

// The dtype of y: out's, or else out_dtype, or else x's.
DType dtype_of_result(const Call& call, const Output& y, std::optional<DType> out_dtype) {
  if (y.accepted() && out_dtype && *out_dtype != call.y.dtype)
    raise(PyExc_ValueError, "out_dtype: %s contradicts out, whose dtype is %s", name(*out_dtype),
          name(call.y.dtype));
  return y.accepted() ? call.y.dtype : out_dtype.value_or(call.x.dtype);
}

// Double where any array with rows of x is, as the library computes then.
DType dtype_of_statistics(const Call& call) {
  for (const ArrayView* view :
       {&call.x, &call.residual, &call.weight, &call.bias, &call.y, &call.residual_out})
    if (view->present() && view->dtype == DType::f64) return DType::f64;
  return DType::f32;
}

// What every norm takes besides x.
void read_norm_options(Call& call, nb::handle weight, nb::handle bias, nb::handle eps,
                       nb::handle weight_offset, nb::handle rounding) {
  read_optional(weight, "weight", Access::read, call.weight);
  read_optional(bias, "bias", Access::read, call.bias);
  call.eps = read_number(eps, "eps");
  call.weight_offset = read_number(weight_offset, "weight_offset");
  call.rounding = read_rounding(rounding);
}

Status compute_on_cpu(const ForwardParams& p, std::int64_t row_begin, std::int64_t row_end) {
  return cpu::forward(p, row_begin, row_end);
}
Status compute_on_cpu(const MeanSquareParams& p, std::int64_t row_begin, std::int64_t row_end) {
  return cpu::mean_square(p, row_begin, row_end);
}

Status launch(const ForwardParams& p, cudaStream_t stream, const cuda::LaunchOptions& options) {
  return cuda::forward(p, stream, options);
}
Status launch(const MeanSquareParams& p, cudaStream_t stream, const cuda::LaunchOptions& options) {
  return cuda::mean_square(p, stream, options);
}

template <class Params>
void run(const Call& call, const Placement& placement) {
  Params params;
  Status status = make_parameters(call, params);
  if (status.ok() && placement.on_cuda) {
    cuda::LaunchOptions options;
    options.device = placement.device;
    status = launch(params, reinterpret_cast<cudaStream_t>(placement.stream), options);
  } else if (status.ok()) {
    const RowRangeFunction compute = [](const void* p, std::int64_t begin, std::int64_t end) {
      return compute_on_cpu(*static_cast<const Params*>(p), begin, end);
    };
    status = for_all_rows(compute, &params, row_count(params.x, params.axis), bytes_moved(call));
  }
  if (!status.ok()) raise_status(status, call);
}

}  // namespace

nb::object rms_norm(nb::handle x, nb::handle weight, nb::handle bias, nb::handle eps,
                    nb::handle axis, nb::handle weight_offset, nb::handle rounding,
                    nb::handle partial, nb::handle out, nb::handle out_dtype,
                    nb::handle return_rstd, nb::handle stream) {
  Call call;
  Output y(call.y);
  Output rstd(call.rstd);
  read_array(x, "x", Access::read, call.x);
  read_norm_options(call, weight, bias, eps, weight_offset, rounding);
  call.axis = read_integer(axis, "axis");
  y.accept(out, "out");
  call.partial = read_number(partial, "partial");
  const bool with_rstd = read_flag(return_rstd, "return_rstd");
  const Placement placement = require_usable(call, stream);
  const DType y_dtype = dtype_of_result(call, y, read_dtype(out_dtype, "out_dtype"));
  require_axis(call);

  if (!y.accepted()) y.allocate(call.x, placement, y_dtype, call.x.sizes, call.x.rank);
  if (with_rstd)
    rstd.allocate(call.x, placement, dtype_of_statistics(call), call.x.sizes, call.first_axis());
  run<ForwardParams>(call, placement);
  if (!with_rstd) return y.take();
  return nb::make_tuple(y.take(), rstd.take());
}

nb::object add_rms_norm(nb::handle x, nb::handle residual, nb::handle weight, nb::handle bias,
                        nb::handle eps, nb::handle weight_offset, nb::handle rounding,
                        nb::handle round_residual, nb::handle out, nb::handle residual_out,
                        nb::handle return_rstd, nb::handle stream) {
  Call call;
  Output y(call.y);
  Output sum(call.residual_out);
  Output rstd(call.rstd);
  read_array(x, "x", Access::read, call.x);
  read_array(residual, "residual", Access::read, call.residual);
  read_norm_options(call, weight, bias, eps, weight_offset, rounding);
  y.accept(out, "out");
  sum.accept(residual_out, "residual_out");
  call.round_residual = read_flag(round_residual, "round_residual");
  const bool with_rstd = read_flag(return_rstd, "return_rstd");
  const Placement placement = require_usable(call, stream);
  require_axis(call);

  if (!y.accepted()) y.allocate(call.x, placement, call.x.dtype, call.x.sizes, call.x.rank);
  if (!sum.accepted())
    sum.allocate(call.x, placement, promote(call.x.dtype, call.residual.dtype), call.x.sizes,
                 call.x.rank);
  if (with_rstd)
    rstd.allocate(call.x, placement, dtype_of_statistics(call), call.x.sizes, call.first_axis());
  run<ForwardParams>(call, placement);
  if (!with_rstd) return nb::make_tuple(y.take(), sum.take());
  return nb::make_tuple(y.take(), sum.take(), rstd.take());
}

nb::object mean_square(nb::handle x, nb::handle out, nb::handle stream) {
  Call call;
  call.mean_square_is_output = true;
  Output result(call.mean_square);
  read_array(x, "x", Access::read, call.x);
  result.accept(out, "out");
  const Placement placement = require_usable(call, stream);
  require_axis(call);

  if (!result.accepted()) {
    const DType dtype = call.x.dtype == DType::f64 ? DType::f64 : DType::f32;
    result.allocate(call.x, placement, dtype, call.x.sizes, call.first_axis());
  }
  run<MeanSquareParams>(call, placement);
  return result.take();
}

nb::object rms_norm_apply(nb::handle x, nb::handle mean_square, nb::handle weight, nb::handle bias,
                          nb::handle eps, nb::handle axis, nb::handle weight_offset,
                          nb::handle rounding, nb::handle out, nb::handle out_dtype,
                          nb::handle stream) {
  Call call;
  Output y(call.y);
  read_array(x, "x", Access::read, call.x);
  read_array(mean_square, "mean_square", Access::read, call.mean_square);
  read_norm_options(call, weight, bias, eps, weight_offset, rounding);
  call.axis = read_integer(axis, "axis");
  y.accept(out, "out");
  const Placement placement = require_usable(call, stream);
  const DType y_dtype = dtype_of_result(call, y, read_dtype(out_dtype, "out_dtype"));
  require_axis(call);

  if (!y.accepted()) y.allocate(call.x, placement, y_dtype, call.x.sizes, call.x.rank);
  run<ForwardParams>(call, placement);
  return y.take();
}

}  // namespace rmsnorm::python
