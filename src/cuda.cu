// The CUDA half, compiled once: what <rmsnorm/cuda.cuh> declares under RMSNORM_COMPILED.
#define RMSNORM_INLINE
#include <rmsnorm/cuda/backward_launch.cuh>
#include <rmsnorm/cuda/forward_launch.cuh>
