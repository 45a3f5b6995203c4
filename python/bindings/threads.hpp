// Threads for Python users: rows split over OpenMP's threads, the GIL let go of while they work.
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

using RowRangeFunction = Status (*)(const void* params, std::int64_t row_begin,
                                    std::int64_t row_end);

// Calls compute(params, ...) for contiguous ranges that cover all rows. `bytes` is what the call
// reads and writes together; it decides on threads and the GIL. Holds the GIL on entry and return.
Status for_all_rows(RowRangeFunction compute, const void* params, std::int64_t rows, double bytes);

}  // namespace rmsnorm::python
