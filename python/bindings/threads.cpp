#include "threads.hpp"

#include <Python.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <rmsnorm/rmsnorm.hpp>
#include <thread>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace rmsnorm::python {
namespace {

// A second thread pays from 5-10 us of serial work on. In cache one core moves some 110 GB/s
// through this kernel in f32 (AVX-512) and 30 GB/s in bf16, so that 512 KiB are 5 and 18 us: two
// threads start there, and each further one brings as much work again.
constexpr double bytes_per_thread = 256 * 1024;

// Letting go of the GIL costs 0.1 us when nobody wants it, but getting it back takes up to the
// switch interval of 5 ms when another thread computes in Python. Below 5 us of work (see above)
// others would gain nothing that is worth this, and no threads of ours need it.
constexpr double bytes_to_release_gil = 512 * 1024;

std::atomic<int> limit{0};  // 0: OpenMP's
std::atomic<bool> forked{false};

Status run_step(const void* params, const Step& step) {
#if defined(_OPENMP)
  if (const int threads = useful_threads(step); threads > 1) {
    if (!cpu::active_isa().ok) return {Code::isa_unavailable, Argument::isa};
    std::atomic<std::int64_t> failure{-1};
#pragma omp parallel num_threads(threads)
    {
      // The runtime may give fewer threads than were asked for.
      const std::int64_t count = omp_get_num_threads();
      const std::int64_t index = omp_get_thread_num();
      // units * index could overflow; whole shares plus one of the remaining units each cannot.
      const std::int64_t share = step.count / count;
      const std::int64_t rest = step.count % count;
      const std::int64_t begin = index * share + std::min(index, rest);
      const Status status = step.compute(params, begin, begin + share + (index < rest ? 1 : 0));
      if (!status.ok())
        failure = static_cast<std::int64_t>(status.code) << 32 |
                  static_cast<std::int64_t>(status.argument);
    }
    if (failure < 0) return {};
    return {static_cast<Code>(failure >> 32), static_cast<Argument>(failure & 0xffffffff)};
  }
#endif
  return step.compute(params, 0, step.count);
}

Status run_steps_in_order(const void* params, const Step* steps, int count) {
  Status status;
  for (int i = 0; i < count && status.ok(); ++i) status = run_step(params, steps[i]);
  return status;
}

// Takes the GIL back, or never returns. While the interpreter ends, Python before 3.14 has a thread
// that asks for the GIL leave by pthread_exit, which unwinds the stack and would thereby give up
// Python objects without the GIL. The thread sleeps instead until the process is gone, as it does
// in later versions.
void restore_or_sleep(PyThreadState* state) {
  try {
    PyEval_RestoreThread(state);
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

}  // namespace

bool initialize_threads() {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
  const char* text = std::getenv("RMSNORM_NUM_THREADS");
  if (text == nullptr || *text == '\0') return true;
  char* end = nullptr;
  errno = 0;
  const long threads = std::strtol(text, &end, 10);
  if (errno != 0 || *end != '\0' || threads < 1 || threads > max_threads) return false;
  limit = static_cast<int>(threads);
  return true;
}

int thread_limit() {
  if (forked) return 1;
#if defined(_OPENMP)
  const int chosen = limit;
  return chosen > 0 ? chosen : omp_get_max_threads();
#else
  return 1;
#endif
}

void set_thread_limit(int threads) { limit = threads; }

int useful_threads(const Step& step) {
  const double useful = std::min(static_cast<double>(step.count), step.bytes / bytes_per_thread);
  return useful < 2 ? 1 : static_cast<int>(std::min<double>(useful, thread_limit()));
}

Status run_steps(const void* params, const Step* steps, int count) {
  double bytes = 0;
  for (int i = 0; i < count; ++i) bytes += steps[i].bytes;
  if (bytes < bytes_to_release_gil) return run_steps_in_order(params, steps, count);
  PyThreadState* state = PyEval_SaveThread();
  const Status status = run_steps_in_order(params, steps, count);
  restore_or_sleep(state);
  return status;
}

}  // namespace rmsnorm::python
