// RMSNorm on CUDA. Include this one header in a file that nvcc compiles, or link rmsnorm::rmsnorm,
// where the kernels are compiled once and this header only declares them (RMSNORM_COMPILED is then
// defined), for any C++ compiler.
//
//   rmsnorm::ForwardParams p;  // with device memory, as for the CPU
//   const rmsnorm::Status status = rmsnorm::cuda::forward(p, stream);
//   if (!status.ok()) std::fprintf(stderr, "%s %s\n", name(status.argument),
//                                  rmsnorm::cuda::error_text(status));
//
// Contract: contract.hpp. A call checks its parameters, launches one kernel on the given stream (or
// two: backward) and returns; it allocates nothing, waits for nothing and may be captured into a
// graph. The first call on a device asks for its architecture, and the first one of a kernel that
// stages rows lets that kernel have all shared memory of a block. All rows of the tensors are
// computed.
//
// The bits of a row depend on the row, the dtypes and options, and the architecture: not on the
// number of rows, strides, alignment, stream or run. Those of dweight and dbias depend on all rows
// that they sum, and on the sizes.
#pragma once

#include <cstdint>

#include "check.hpp"
#include "contract.hpp"

struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;

namespace rmsnorm {
namespace cuda {

constexpr int current_device = -1;

struct LaunchOptions {
  // On which the memory lies and the kernel runs. The thread's device and contexts are afterwards
  // what they were before, and no other device gets a context.
  int device = current_device;
  // From compute capability 9.0 on (elsewhere without effect): the kernel may be started before the
  // one ahead of it in the stream has finished, and lets the one behind it start early. It waits
  // for what it reads; the kernel ahead should call cudaTriggerProgrammaticLaunchCompletion().
  bool programmatic = false;
  // Promises that no kernel still running writes the weight: it is then read before that wait.
  bool constant_weight = false;
};

// Errors beyond those of check(): cuda_error with the cudaError_t in Status::cuda_error, whose text
// is error_text(); cuda_unavailable where the library was built without CUDA. After an error of
// the launch nothing was written.
Status forward(const ForwardParams& p, cudaStream_t stream,
               const LaunchOptions& options = LaunchOptions()) noexcept;
Status mean_square(const MeanSquareParams& p, cudaStream_t stream,
                   const LaunchOptions& options = LaunchOptions()) noexcept;

// Gradients of all rows, by one kernel, and a second one where dweight or dbias is present. The
// workspace is device memory of backward_workspace(p) bytes, which depend on sizes and dtypes alone
// (0 without dweight and dbias, and for parameters that check() refuses); its contents mean nothing
// before and after, and must not be touched until the kernels are done. After an error of the
// second launch dx is computed, and dweight and dbias are not.
std::int64_t backward_workspace(const BackwardParams& p) noexcept;
Status backward(const BackwardParams& p, cudaStream_t stream,
                const LaunchOptions& options = LaunchOptions()) noexcept;

// One sentence, CUDA's own for a cuda_error.
const char* error_text(const Status& status) noexcept;

}  // namespace cuda
}  // namespace rmsnorm

#if !defined(RMSNORM_COMPILED)
#if !defined(__CUDACC__) && !defined(RMSNORM_CUDA_EMULATED)
#error "compile with nvcc, or link rmsnorm::rmsnorm"
#endif
#include "cuda/backward_launch.cuh"
#include "cuda/forward_launch.cuh"
#endif
