// Threads for Python users: work split over OpenMP's threads, the GIL let go of while they work.
// The library itself starts no thread.
#pragma once

#include <cstdint>
#include <rmsnorm/contract.hpp>

namespace rmsnorm::python {

// More would run no faster on any machine, and libgomp ends the process when the system refuses it
// a thread.
constexpr int max_threads = 1024;

// Reads RMSNORM_NUM_THREADS and arranges for forked children; called once, at import. False when
// that variable is set to something else than 1 ... max_threads, which is then ignored.
bool initialize_threads();

// The most threads that a call uses: the number set, else RMSNORM_NUM_THREADS, else OpenMP's. One
// in a forked child, where libgomp hangs if the parent used threads, and without OpenMP.
int thread_limit();
void set_thread_limit(int threads);

constexpr bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

// One step of a computation: units 0 ... count-1 of work, rows for example, of which
// compute(params, begin, end) does a range. `bytes` is what the step reads and writes together.
// Before several threads do ranges the ISA is known to be chosen: one that is chosen meanwhile
// would have some ranges refused and others written.
struct Step {
  Status (*compute)(const void* params, std::int64_t begin, std::int64_t end);
  std::int64_t count;
  double bytes;
};

// How many threads a step has work for, at most thread_limit().
int useful_threads(const Step& step);

// Does the steps one after the other, up to the first that fails, each in contiguous ranges that
// cover its units. The bytes decide on threads and the GIL. Holds the GIL on entry and return.
Status run_steps(const void* params, const Step* steps, int count);

}  // namespace rmsnorm::python
