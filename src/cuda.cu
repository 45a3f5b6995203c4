// The CUDA half, compiled once: what <rmsnorm/cuda.cuh> declares under RMSNORM_COMPILED.
#define RMSNORM_INLINE
#include <rmsnorm/cuda/launch.cuh>
