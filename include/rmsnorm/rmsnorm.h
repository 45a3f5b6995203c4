/* RMSNorm for C and for foreign-function interfaces, from the compiled library rmsnorm::rmsnorm.
 *
 * The formulas, sizes, aliasing rules and promises are those of contract.hpp; the names here are
 * the same with the prefix rmsnorm_. Every function is thread-safe, allocates nothing and does not
 * throw.
 *
 *   rmsnorm_forward_params p;
 *   rmsnorm_forward_params_init(&p);
 *   p.x = rmsnorm_matrix(x, RMSNORM_F32, rows, n, n);
 *   p.weight = rmsnorm_vector(weight, RMSNORM_F32, n);
 *   p.y = rmsnorm_matrix(y, RMSNORM_F32, rows, n, n);
 *   rmsnorm_status s = rmsnorm_cpu_forward(&p, 0, rows);
 *   if (s.code != RMSNORM_OK)
 *     fprintf(stderr, "%s %s\n", rmsnorm_argument_name(s), rmsnorm_status_text(s));
 */
#ifndef RMSNORM_RMSNORM_H
#define RMSNORM_RMSNORM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { RMSNORM_F16 = 0, RMSNORM_BF16 = 1, RMSNORM_F32 = 2, RMSNORM_F64 = 3 };

enum { RMSNORM_ROUNDING_ONCE = 0, RMSNORM_ROUNDING_BEFORE_WEIGHT = 1, RMSNORM_ROUNDING_RSTD = 2 };

enum { RMSNORM_MAX_RANK = 8 };

enum {
  RMSNORM_OK = 0,
  RMSNORM_MISSING = 1,
  RMSNORM_UNEXPECTED = 2,
  RMSNORM_INVALID_DTYPE = 3,
  RMSNORM_INVALID_RANK = 4,
  RMSNORM_INVALID_SIZE = 5,
  RMSNORM_INVALID_VALUE = 6,
  RMSNORM_NULL_DATA = 7,
  RMSNORM_SELF_OVERLAP = 8,
  RMSNORM_OVERLAP = 9,
  RMSNORM_ISA_UNAVAILABLE = 10,
  RMSNORM_CUDA_ERROR = 11,
  RMSNORM_CUDA_UNAVAILABLE = 12,
  RMSNORM_TOO_MANY_ELEMENTS = 13,
  RMSNORM_UNADDRESSABLE = 14
};

/* A view of memory that the caller owns: strides in elements, of any sign; a rank of -1 is an
 * absent tensor. Inputs are not written. */
typedef struct rmsnorm_tensor {
  void* data;
  int32_t dtype;
  int32_t rank;
  int64_t sizes[RMSNORM_MAX_RANK];
  int64_t strides[RMSNORM_MAX_RANK];
} rmsnorm_tensor;

typedef struct rmsnorm_status {
  int32_t code;       /* RMSNORM_OK: success */
  int32_t argument;   /* what the code speaks of */
  int32_t cuda_error; /* the cudaError_t of RMSNORM_CUDA_ERROR */
} rmsnorm_status;

typedef struct rmsnorm_forward_params {
  rmsnorm_tensor x;
  rmsnorm_tensor residual;
  rmsnorm_tensor weight;
  rmsnorm_tensor bias;
  rmsnorm_tensor mean_square;
  rmsnorm_tensor y;
  rmsnorm_tensor residual_out;
  rmsnorm_tensor rstd;
  int32_t axis;           /* first normalised axis; -1 after init */
  int32_t rounding;       /* RMSNORM_ROUNDING_ONCE after init */
  double eps;             /* 1e-6 after init */
  double weight_offset;   /* 0 after init */
  double partial;         /* 1 after init */
  int32_t round_residual; /* 1 after init */
} rmsnorm_forward_params;

typedef struct rmsnorm_mean_square_params {
  rmsnorm_tensor x;
  rmsnorm_tensor mean_square;
  int32_t axis;   /* -1 after init */
  double partial; /* 1 after init */
} rmsnorm_mean_square_params;

/* Gradients: see BackwardParams of contract.hpp. */
typedef struct rmsnorm_backward_params {
  rmsnorm_tensor dy;
  rmsnorm_tensor x;
  rmsnorm_tensor residual;
  rmsnorm_tensor weight;
  rmsnorm_tensor rstd;
  rmsnorm_tensor mean_square;
  rmsnorm_tensor d_residual;
  rmsnorm_tensor dx;
  rmsnorm_tensor dweight;
  rmsnorm_tensor dbias;
  rmsnorm_tensor d_mean_square;
  void* workspace; /* at a multiple of 64 bytes; null after init */
  int64_t workspace_bytes;
  int32_t axis;         /* -1 after init */
  double eps;           /* 1e-6 after init */
  double weight_offset; /* 0 after init */
  double partial;       /* 1 after init */
} rmsnorm_backward_params;

/* Every tensor absent, every option at its default. */
void rmsnorm_forward_params_init(rmsnorm_forward_params* p);
void rmsnorm_backward_params_init(rmsnorm_backward_params* p);
void rmsnorm_mean_square_params_init(rmsnorm_mean_square_params* p);

rmsnorm_tensor rmsnorm_vector(const void* data, int32_t dtype, int64_t n);
rmsnorm_tensor rmsnorm_matrix(const void* data, int32_t dtype, int64_t rows, int64_t n,
                              int64_t row_stride);

/* Computes rows [row_begin, row_end); on an error nothing is written. */
rmsnorm_status rmsnorm_cpu_forward(const rmsnorm_forward_params* p, int64_t row_begin,
                                   int64_t row_end);
rmsnorm_status rmsnorm_cpu_mean_square(const rmsnorm_mean_square_params* p, int64_t row_begin,
                                       int64_t row_end);

/* Blocks of rows, then columns of dweight and dbias; how many blocks there are and how many bytes
 * the workspace needs: see rmsnorm.hpp. */
int64_t rmsnorm_cpu_backward_blocks(const rmsnorm_backward_params* p);
int64_t rmsnorm_cpu_backward_workspace(const rmsnorm_backward_params* p);
rmsnorm_status rmsnorm_cpu_backward(const rmsnorm_backward_params* p, int64_t block_begin,
                                    int64_t block_end);
rmsnorm_status rmsnorm_cpu_backward_reduce(const rmsnorm_backward_params* p, int64_t column_begin,
                                           int64_t column_end);

/* On the GPU, with device memory: see cuda.cuh. All rows are computed, by one kernel on the stream
 * (a cudaStream_t; null: the default stream). Null options are those after init. */
enum { RMSNORM_CUDA_CURRENT_DEVICE = -1 };

typedef struct rmsnorm_cuda_launch_options {
  int32_t device;          /* RMSNORM_CUDA_CURRENT_DEVICE after init */
  int32_t programmatic;    /* 0 after init */
  int32_t constant_weight; /* 0 after init */
} rmsnorm_cuda_launch_options;

void rmsnorm_cuda_launch_options_init(rmsnorm_cuda_launch_options* options);
rmsnorm_status rmsnorm_cuda_forward(const rmsnorm_forward_params* p, void* stream,
                                    const rmsnorm_cuda_launch_options* options);
rmsnorm_status rmsnorm_cuda_mean_square(const rmsnorm_mean_square_params* p, void* stream,
                                        const rmsnorm_cuda_launch_options* options);

/* Two kernels where dweight or dbias is present; the workspace is device memory of so many bytes.
 */
int64_t rmsnorm_cuda_backward_workspace(const rmsnorm_backward_params* p);
rmsnorm_status rmsnorm_cuda_backward(const rmsnorm_backward_params* p, void* stream,
                                     const rmsnorm_cuda_launch_options* options);

/* Static strings: what is wrong (CUDA's own text for RMSNORM_CUDA_ERROR), with which argument, the
 * version, the instruction set in use (empty where RMSNORM_ISA names one that cannot run here). */
const char* rmsnorm_status_text(rmsnorm_status s);
const char* rmsnorm_argument_name(rmsnorm_status s);
const char* rmsnorm_version(void);
const char* rmsnorm_cpu_isa(void);

#ifdef __cplusplus
}
#endif

#endif
