// The C ABI over the C++ contract.
#include <rmsnorm/rmsnorm.h>

#include <rmsnorm/cuda.cuh>
#include <rmsnorm/rmsnorm.hpp>

namespace {

using rmsnorm::Argument;
using rmsnorm::Code;

static_assert(RMSNORM_MAX_RANK == rmsnorm::max_rank, "one rank for C and C++");
static_assert(RMSNORM_F16 == static_cast<int>(rmsnorm::DType::f16) &&
                  RMSNORM_BF16 == static_cast<int>(rmsnorm::DType::bf16) &&
                  RMSNORM_F32 == static_cast<int>(rmsnorm::DType::f32) &&
                  RMSNORM_F64 == static_cast<int>(rmsnorm::DType::f64),
              "one numbering of dtypes for C and C++");
static_assert(RMSNORM_ROUNDING_BEFORE_WEIGHT ==
                      static_cast<int>(rmsnorm::Rounding::before_weight) &&
                  RMSNORM_ROUNDING_RSTD == static_cast<int>(rmsnorm::Rounding::rstd),
              "one numbering of roundings for C and C++");

static_assert(RMSNORM_OK == static_cast<int>(Code::ok) &&
                  RMSNORM_MISSING == static_cast<int>(Code::missing) &&
                  RMSNORM_UNEXPECTED == static_cast<int>(Code::unexpected) &&
                  RMSNORM_INVALID_DTYPE == static_cast<int>(Code::invalid_dtype) &&
                  RMSNORM_INVALID_RANK == static_cast<int>(Code::invalid_rank) &&
                  RMSNORM_INVALID_SIZE == static_cast<int>(Code::invalid_size) &&
                  RMSNORM_INVALID_VALUE == static_cast<int>(Code::invalid_value) &&
                  RMSNORM_NULL_DATA == static_cast<int>(Code::null_data) &&
                  RMSNORM_SELF_OVERLAP == static_cast<int>(Code::self_overlap) &&
                  RMSNORM_OVERLAP == static_cast<int>(Code::overlap) &&
                  RMSNORM_ISA_UNAVAILABLE == static_cast<int>(Code::isa_unavailable) &&
                  RMSNORM_CUDA_ERROR == static_cast<int>(Code::cuda_error) &&
                  RMSNORM_CUDA_UNAVAILABLE == static_cast<int>(Code::cuda_unavailable) &&
                  RMSNORM_TOO_MANY_ELEMENTS == static_cast<int>(Code::too_many_elements) &&
                  RMSNORM_UNADDRESSABLE == static_cast<int>(Code::unaddressable),
              "one numbering of codes for C and C++");
static_assert(RMSNORM_CUDA_CURRENT_DEVICE == rmsnorm::cuda::current_device,
              "one name of the current device for C and C++");

rmsnorm::Tensor to_tensor(const rmsnorm_tensor& t) {
  rmsnorm::Tensor result;
  result.data = t.data;
  result.dtype = static_cast<rmsnorm::DType>(t.dtype);
  result.rank = t.rank;
  for (int d = 0; d < rmsnorm::max_rank; ++d) {
    result.sizes[d] = t.sizes[d];
    result.strides[d] = t.strides[d];
  }
  return result;
}

rmsnorm_status to_status(rmsnorm::Status s) {
  return {static_cast<int32_t>(s.code), static_cast<int32_t>(s.argument), s.cuda_error};
}

rmsnorm::ForwardParams to_params(const rmsnorm_forward_params& p) {
  rmsnorm::ForwardParams params;
  params.x = to_tensor(p.x);
  params.residual = to_tensor(p.residual);
  params.weight = to_tensor(p.weight);
  params.bias = to_tensor(p.bias);
  params.mean_square = to_tensor(p.mean_square);
  params.y = to_tensor(p.y);
  params.residual_out = to_tensor(p.residual_out);
  params.rstd = to_tensor(p.rstd);
  params.axis = p.axis;
  params.rounding = static_cast<rmsnorm::Rounding>(p.rounding);
  params.eps = p.eps;
  params.weight_offset = p.weight_offset;
  params.partial = p.partial;
  params.round_residual = p.round_residual != 0;
  return params;
}

rmsnorm::BackwardParams to_params(const rmsnorm_backward_params& p) {
  rmsnorm::BackwardParams params;
  params.dy = to_tensor(p.dy);
  params.x = to_tensor(p.x);
  params.residual = to_tensor(p.residual);
  params.weight = to_tensor(p.weight);
  params.rstd = to_tensor(p.rstd);
  params.mean_square = to_tensor(p.mean_square);
  params.d_residual = to_tensor(p.d_residual);
  params.dx = to_tensor(p.dx);
  params.dweight = to_tensor(p.dweight);
  params.dbias = to_tensor(p.dbias);
  params.d_mean_square = to_tensor(p.d_mean_square);
  params.workspace = p.workspace;
  params.workspace_bytes = p.workspace_bytes;
  params.axis = p.axis;
  params.eps = p.eps;
  params.weight_offset = p.weight_offset;
  params.partial = p.partial;
  return params;
}

rmsnorm::MeanSquareParams to_params(const rmsnorm_mean_square_params& p) {
  rmsnorm::MeanSquareParams params;
  params.x = to_tensor(p.x);
  params.mean_square = to_tensor(p.mean_square);
  params.axis = p.axis;
  params.partial = p.partial;
  return params;
}

cudaStream_t to_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

rmsnorm::cuda::LaunchOptions to_options(const rmsnorm_cuda_launch_options* o) {
  rmsnorm::cuda::LaunchOptions options;
  if (o == nullptr) return options;
  options.device = o->device;
  options.programmatic = o->programmatic != 0;
  options.constant_weight = o->constant_weight != 0;
  return options;
}

rmsnorm_tensor absent() {
  rmsnorm_tensor t = {};
  t.dtype = RMSNORM_F32;
  t.rank = -1;
  return t;
}

}  // namespace

extern "C" {

void rmsnorm_forward_params_init(rmsnorm_forward_params* p) {
  const rmsnorm::ForwardParams defaults;
  p->x = p->residual = p->weight = p->bias = p->mean_square = absent();
  p->y = p->residual_out = p->rstd = absent();
  p->axis = defaults.axis;
  p->rounding = static_cast<int32_t>(defaults.rounding);
  p->eps = defaults.eps;
  p->weight_offset = defaults.weight_offset;
  p->partial = defaults.partial;
  p->round_residual = defaults.round_residual ? 1 : 0;
}

void rmsnorm_backward_params_init(rmsnorm_backward_params* p) {
  const rmsnorm::BackwardParams defaults;
  p->dy = p->x = p->residual = p->weight = p->rstd = p->mean_square = p->d_residual = absent();
  p->dx = p->dweight = p->dbias = p->d_mean_square = absent();
  p->workspace = defaults.workspace;
  p->workspace_bytes = defaults.workspace_bytes;
  p->axis = defaults.axis;
  p->eps = defaults.eps;
  p->weight_offset = defaults.weight_offset;
  p->partial = defaults.partial;
}

void rmsnorm_mean_square_params_init(rmsnorm_mean_square_params* p) {
  const rmsnorm::MeanSquareParams defaults;
  p->x = p->mean_square = absent();
  p->axis = defaults.axis;
  p->partial = defaults.partial;
}

rmsnorm_tensor rmsnorm_vector(const void* data, int32_t dtype, int64_t n) {
  rmsnorm_tensor t = absent();
  t.data = const_cast<void*>(data);
  t.dtype = dtype;
  t.rank = 1;
  t.sizes[0] = n;
  t.strides[0] = 1;
  return t;
}

rmsnorm_tensor rmsnorm_matrix(const void* data, int32_t dtype, int64_t rows, int64_t n,
                              int64_t row_stride) {
  rmsnorm_tensor t = rmsnorm_vector(data, dtype, rows);
  t.rank = 2;
  t.sizes[1] = n;
  t.strides[0] = row_stride;
  t.strides[1] = 1;
  return t;
}

rmsnorm_status rmsnorm_cpu_forward(const rmsnorm_forward_params* p, int64_t row_begin,
                                   int64_t row_end) {
  return to_status(rmsnorm::cpu::forward(to_params(*p), row_begin, row_end));
}

rmsnorm_status rmsnorm_cpu_mean_square(const rmsnorm_mean_square_params* p, int64_t row_begin,
                                       int64_t row_end) {
  return to_status(rmsnorm::cpu::mean_square(to_params(*p), row_begin, row_end));
}

int64_t rmsnorm_cpu_backward_blocks(const rmsnorm_backward_params* p) {
  return rmsnorm::cpu::backward_blocks(to_params(*p));
}

int64_t rmsnorm_cpu_backward_workspace(const rmsnorm_backward_params* p) {
  return rmsnorm::cpu::backward_workspace(to_params(*p));
}

rmsnorm_status rmsnorm_cpu_backward(const rmsnorm_backward_params* p, int64_t block_begin,
                                    int64_t block_end) {
  return to_status(rmsnorm::cpu::backward(to_params(*p), block_begin, block_end));
}

rmsnorm_status rmsnorm_cpu_backward_reduce(const rmsnorm_backward_params* p, int64_t column_begin,
                                           int64_t column_end) {
  return to_status(rmsnorm::cpu::backward_reduce(to_params(*p), column_begin, column_end));
}

void rmsnorm_cuda_launch_options_init(rmsnorm_cuda_launch_options* options) {
  const rmsnorm::cuda::LaunchOptions defaults;
  options->device = defaults.device;
  options->programmatic = defaults.programmatic ? 1 : 0;
  options->constant_weight = defaults.constant_weight ? 1 : 0;
}

rmsnorm_status rmsnorm_cuda_forward(const rmsnorm_forward_params* p, void* stream,
                                    const rmsnorm_cuda_launch_options* options) {
  return to_status(rmsnorm::cuda::forward(to_params(*p), to_stream(stream), to_options(options)));
}

rmsnorm_status rmsnorm_cuda_mean_square(const rmsnorm_mean_square_params* p, void* stream,
                                        const rmsnorm_cuda_launch_options* options) {
  return to_status(
      rmsnorm::cuda::mean_square(to_params(*p), to_stream(stream), to_options(options)));
}

int64_t rmsnorm_cuda_backward_workspace(const rmsnorm_backward_params* p) {
  return rmsnorm::cuda::backward_workspace(to_params(*p));
}

rmsnorm_status rmsnorm_cuda_backward(const rmsnorm_backward_params* p, void* stream,
                                     const rmsnorm_cuda_launch_options* options) {
  return to_status(rmsnorm::cuda::backward(to_params(*p), to_stream(stream), to_options(options)));
}

const char* rmsnorm_status_text(rmsnorm_status s) {
  rmsnorm::Status status;
  status.code = static_cast<Code>(s.code);
  status.cuda_error = s.cuda_error;
  return rmsnorm::cuda::error_text(status);
}

const char* rmsnorm_argument_name(rmsnorm_status s) {
  return rmsnorm::name(static_cast<Argument>(s.argument));
}

const char* rmsnorm_version(void) { return RMSNORM_VERSION; }

const char* rmsnorm_cpu_isa(void) {
  const rmsnorm::cpu::IsaChoice choice = rmsnorm::cpu::active_isa();
  return choice.ok ? rmsnorm::cpu::name(choice.isa) : "";
}

}  // extern "C"
