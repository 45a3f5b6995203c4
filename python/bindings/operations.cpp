#include "operations.hpp"

#include <optional>
#include <rmsnorm/cuda.cuh>
#include <rmsnorm/rmsnorm.hpp>

#include "autograd.hpp"
#include "call.hpp"
#include "errors.hpp"
#include "options.hpp"
#include "parameters.hpp"
#include "placement.hpp"
#include "results.hpp"
#include "steps.hpp"
#include "workspace.hpp"

namespace rmsnorm::python {
namespace {

// What concerns all arrays of a call at once, after what each is. The rest of the caller's code
// that a call runs is behind it then, but for that which place and Output::allocate answer for.
Placement require_usable(Call& call, nb::handle stream) {
  require_no_derivatives(call);
  read_memory(call);
  return place(call, stream);
}

// The shapes of results are taken from x and its axis before the library checks the call. Where x
// repeats its elements it may have more of them than there is memory for.
void require_rows(const Call& call) {
  if (call.x.rank == 0) raise_status({Code::invalid_rank, Argument::x}, call);
  if (call.axis < -call.x.rank || call.axis >= call.x.rank)
    raise_status({Code::invalid_value, Argument::axis}, call);
  std::int64_t count = 1;
  for (int d = 0; d < call.x.rank; ++d)
    count = rmsnorm::detail::saturated_product(count, call.x.sizes[d]);
  if (count > rmsnorm::detail::max_elements)
    raise_status({Code::too_many_elements, Argument::x}, call);
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

template <class Params>
Status compute_on_cpu(const Call& call, const Placement&, const Params& params) {
  const Step step = row_step(call, params);
  return run_steps(&params, &step, 1);
}

Status compute_on_cpu(const Call& call, const Placement& placement, const BackwardParams& params) {
  cpu::BackwardPass pass(params);
  Workspace workspace(call, placement);
  const std::int64_t bytes = pass.workspace_bytes();
  const Status status = pass.set_workspace(workspace.allocate(bytes), bytes);
  if (!status.ok()) return status;
  const BackwardSteps steps = backward_steps(call, pass);
  return run_steps(&pass, steps.step, steps.count);
}

Status launch(const ForwardParams& p, cudaStream_t stream, const cuda::LaunchOptions& options) {
  return cuda::forward(p, stream, options);
}
Status launch(const MeanSquareParams& p, cudaStream_t stream, const cuda::LaunchOptions& options) {
  return cuda::mean_square(p, stream, options);
}

cuda::LaunchOptions on_device(const Placement& placement) {
  cuda::LaunchOptions options;
  options.device = placement.device;
  return options;
}

cudaStream_t stream_of(const Placement& placement) {
  return reinterpret_cast<cudaStream_t>(placement.stream);
}

template <class Params>
Status compute_on_cuda(const Call&, const Placement& placement, const Params& params) {
  return launch(params, stream_of(placement), on_device(placement));
}

Status compute_on_cuda(const Call& call, const Placement& placement, BackwardParams& params) {
  Workspace workspace(call, placement);
  params.workspace_bytes = cuda::backward_workspace(params);
  params.workspace = workspace.allocate(params.workspace_bytes);
  return cuda::backward(params, stream_of(placement), on_device(placement));
}

template <class Params>
void run(const Call& call, const Placement& placement) {
  Params params;
  Status status = make_parameters(call, params);
  if (status.ok())
    status = placement.on_cuda ? compute_on_cuda(call, placement, params)
                               : compute_on_cpu(call, placement, params);
  if (status.code == Code::cuda_error) raise_cuda(status.cuda_error, placement);
  if (!status.ok()) raise_status(status, call);
}

}  // namespace

nb::object rms_norm(nb::handle x, nb::handle weight, nb::handle bias, nb::handle eps,
                    nb::handle axis, nb::handle weight_offset, nb::handle rounding,
                    nb::handle partial, nb::handle out, nb::handle out_dtype,
                    nb::handle return_rstd, nb::handle stream) {
  Call call;
  Output y(call, call.y);
  Output rstd(call, call.rstd);
  read_array(x, "x", Access::read, call.x);
  read_norm_options(call, weight, bias, eps, weight_offset, rounding);
  call.axis = read_integer(axis, "axis");
  y.accept(out, "out");
  call.partial = read_number(partial, "partial");
  const bool with_rstd = read_flag(return_rstd, "return_rstd");
  const std::optional<DType> dtype = read_dtype(out_dtype, "out_dtype");
  read_requires_grad(call);
  if (is_differentiable(call, stream)) {
    read_memory(call);
    require_rows(call);
    return differentiable_rms_norm(call, rounding, dtype, with_rstd);
  }
  const Placement placement = require_usable(call, stream);
  const DType y_dtype = dtype_of_result(call, y, dtype);
  require_rows(call);

  if (!y.accepted()) y.allocate(placement, y_dtype, call.x.sizes, call.x.rank);
  if (with_rstd)
    rstd.allocate(placement, dtype_of_statistics(call), call.x.sizes, call.first_axis());
  try_imports(call, {&y, &rstd});
  run<ForwardParams>(call, placement);
  count_writes({&y});
  if (!with_rstd) return y.take();
  return nb::make_tuple(y.take(), rstd.take());
}

nb::object add_rms_norm(nb::handle x, nb::handle residual, nb::handle weight, nb::handle bias,
                        nb::handle eps, nb::handle axis, nb::handle weight_offset,
                        nb::handle rounding, nb::handle round_residual, nb::handle out,
                        nb::handle residual_out, nb::handle return_rstd, nb::handle stream) {
  Call call;
  Output y(call, call.y);
  Output sum(call, call.residual_out);
  Output rstd(call, call.rstd);
  read_array(x, "x", Access::read, call.x);
  read_array(residual, "residual", Access::read, call.residual);
  read_norm_options(call, weight, bias, eps, weight_offset, rounding);
  call.axis = read_integer(axis, "axis");
  y.accept(out, "out");
  sum.accept(residual_out, "residual_out");
  call.round_residual = read_flag(round_residual, "round_residual");
  const bool with_rstd = read_flag(return_rstd, "return_rstd");
  read_requires_grad(call);
  if (is_differentiable(call, stream)) {
    read_memory(call);
    require_rows(call);
    return differentiable_add_rms_norm(call, rounding, with_rstd);
  }
  const Placement placement = require_usable(call, stream);
  require_rows(call);

  if (!y.accepted()) y.allocate(placement, call.x.dtype, call.x.sizes, call.x.rank);
  if (!sum.accepted())
    sum.allocate(placement, promote(call.x.dtype, call.residual.dtype), call.x.sizes, call.x.rank);
  if (with_rstd)
    rstd.allocate(placement, dtype_of_statistics(call), call.x.sizes, call.first_axis());
  try_imports(call, {&y, &sum, &rstd});
  run<ForwardParams>(call, placement);
  count_writes({&y, &sum});
  if (!with_rstd) return nb::make_tuple(y.take(), sum.take());
  return nb::make_tuple(y.take(), sum.take(), rstd.take());
}

nb::object mean_square(nb::handle x, nb::handle out, nb::handle stream) {
  Call call;
  call.mean_square_is_output = true;
  Output result(call, call.mean_square);
  read_array(x, "x", Access::read, call.x);
  result.accept(out, "out");
  read_requires_grad(call);
  const Placement placement = require_usable(call, stream);
  require_rows(call);

  if (!result.accepted()) {
    const DType dtype = call.x.dtype == DType::f64 ? DType::f64 : DType::f32;
    result.allocate(placement, dtype, call.x.sizes, call.first_axis());
  }
  run<MeanSquareParams>(call, placement);
  count_writes({&result});
  return result.take();
}

nb::object rms_norm_apply(nb::handle x, nb::handle mean_square, nb::handle weight, nb::handle bias,
                          nb::handle eps, nb::handle axis, nb::handle weight_offset,
                          nb::handle rounding, nb::handle out, nb::handle out_dtype,
                          nb::handle stream) {
  Call call;
  Output y(call, call.y);
  read_array(x, "x", Access::read, call.x);
  read_array(mean_square, "mean_square", Access::read, call.mean_square);
  read_norm_options(call, weight, bias, eps, weight_offset, rounding);
  call.axis = read_integer(axis, "axis");
  y.accept(out, "out");
  const std::optional<DType> dtype = read_dtype(out_dtype, "out_dtype");
  read_requires_grad(call);
  const Placement placement = require_usable(call, stream);
  const DType y_dtype = dtype_of_result(call, y, dtype);
  require_rows(call);

  if (!y.accepted()) y.allocate(placement, y_dtype, call.x.sizes, call.x.rank);
  run<ForwardParams>(call, placement);
  count_writes({&y});
  return y.take();
}

nb::object rms_norm_backward(nb::handle dy, nb::handle x, nb::handle weight, nb::handle rstd,
                             nb::handle eps, nb::handle axis, nb::handle weight_offset,
                             nb::handle rounding, nb::handle partial, nb::handle residual,
                             nb::handle mean_square, nb::handle d_residual, nb::handle has_bias,
                             nb::handle needs_dweight, nb::handle dx_out, nb::handle dweight_out,
                             nb::handle dbias_out, nb::handle stream) {
  Gradients gradients;
  Call call;
  call.gradients = &gradients;
  Output dx(call, gradients.dx);
  Output dweight(call, gradients.dweight);
  Output dbias(call, gradients.dbias);
  Output d_mean_square(call, gradients.d_mean_square);
  read_array(dy, "dy", Access::read, gradients.dy);
  read_array(x, "x", Access::read, call.x);
  read_norm_options(call, weight, nb::none(), eps, weight_offset, rounding);
  read_optional(rstd, "rstd", Access::read, call.rstd);
  call.axis = read_integer(axis, "axis");
  call.partial = read_number(partial, "partial");
  read_optional(residual, "residual", Access::read, call.residual);
  read_optional(mean_square, "mean_square", Access::read, call.mean_square);
  read_optional(d_residual, "d_residual", Access::read, gradients.d_residual);
  dx.accept(dx_out, "dx_out");
  dweight.accept(dweight_out, "dweight_out");
  dbias.accept(dbias_out, "dbias_out");
  const bool with_dbias = read_flag(has_bias, "has_bias") || dbias.accepted();
  const bool with_dweight = read_flag(needs_dweight, "needs_dweight") && call.weight.present();
  if (dweight.accepted() && !with_dweight)
    raise(PyExc_ValueError, "dweight_out: was given %s; expected None",
          call.weight.present() ? "with needs_dweight=False" : "without weight");
  read_requires_grad(call);
  const Placement placement = require_usable(call, stream);
  require_rows(call);

  if (!dx.accepted()) dx.allocate(placement, call.x.dtype, call.x.sizes, call.x.rank);
  if (with_dweight && !dweight.accepted()) {
    // What is no weight of this x may claim more elements than any memory has.
    const Status status = check_shape(call, Argument::weight);
    if (!status.ok()) raise_status(status, call);
    dweight.allocate(placement, call.weight.dtype, call.weight.sizes, call.weight.rank);
  }
  const int first = call.first_axis();
  if (with_dbias && !dbias.accepted())
    dbias.allocate(placement, call.weight.present() ? call.weight.dtype : call.x.dtype,
                   call.x.sizes + first, call.x.rank - first);
  if (call.mean_square.present())
    d_mean_square.allocate(placement, call.mean_square.dtype, call.x.sizes, first);
  try_imports(call, {&dx, &dweight, &dbias, &d_mean_square});
  run<BackwardParams>(call, placement);
  count_writes({&dx, &dweight, &dbias});
  nb::object results[] = {dx.take(), with_dweight ? dweight.take() : nb::none(),
                          with_dbias ? dbias.take() : nb::none()};
  if (!call.mean_square.present()) return nb::make_tuple(results[0], results[1], results[2]);
  return nb::make_tuple(results[0], results[1], results[2], d_mean_square.take());
}

}  // namespace rmsnorm::python
