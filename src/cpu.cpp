// The CPU half, compiled once: what <rmsnorm/rmsnorm.hpp> declares under RMSNORM_COMPILED.
#define RMSNORM_INLINE
#include <rmsnorm/cpu/dispatch.hpp>
