#include "xla_threads.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <rmsnorm/rmsnorm.hpp>
#include <thread>

namespace rmsnorm::python::xla {
namespace {

// Ranges per thread: XLA's threads may be busy elsewhere or come late, and whoever is there does
// what is left.
constexpr std::int64_t ranges_per_thread = 4;

// What the threads of a step share. It outlives the step, since a task may start when nothing is
// left; params do not.
class SharedStep {
 public:
  SharedStep(const void* params, const Step& step, std::int64_t ranges)
      : params_(params), step_(step), ranges_(ranges) {}

  // Does ranges until none is left.
  void work() {
    for (;;) {
      const std::int64_t range = next_.fetch_add(1);
      if (range >= ranges_) return;
      const std::int64_t share = step_.count / ranges_, rest = step_.count % ranges_;
      const std::int64_t begin = range * share + std::min(range, rest);
      const Status status = step_.compute(params_, begin, begin + share + (range < rest ? 1 : 0));
      if (!status.ok()) code_ = status.code, argument_ = status.argument;
      done_.fetch_add(1);
    }
  }

  // Ranges that others have begun are all that it waits for: their threads are running.
  Status wait() const {
    while (done_ < ranges_) std::this_thread::yield();
    return {code_, argument_};
  }

 private:
  const void* const params_;
  const Step step_;
  const std::int64_t ranges_;
  std::atomic<std::int64_t> next_{0};
  std::atomic<std::int64_t> done_{0};
  std::atomic<Code> code_{Code::ok};
  std::atomic<Argument> argument_{Argument::none};
};

using Shared = std::shared_ptr<SharedStep>;

void work_on(void* task) {
  const std::unique_ptr<Shared> shared(static_cast<Shared*>(task));
  (*shared)->work();
}

// False where XLA has no threads for this call.
bool schedule(const CallFrame& frame, const Shared& step) {
  auto task = std::make_unique<Shared>(step);
  ScheduleTask request = {sizeof(ScheduleTask), nullptr, frame.context, work_on, task.get()};
  if (Error* error = frame.api->schedule_task(&request); error != nullptr) {
    discard(frame, error);
    return false;
  }
  task.release();
  return true;
}

}  // namespace

void discard(const CallFrame& frame, Error* error) {
  if (error == nullptr) return;
  DestroyError request = {sizeof(DestroyError), nullptr, error};
  frame.api->destroy_error(&request);
}

Status run_step(const CallFrame& frame, const void* params, const Step& step) {
  const int threads = useful_threads(step);
  if (threads == 1) return step.compute(params, 0, step.count);
  if (!cpu::active_isa().ok) return {Code::isa_unavailable, Argument::isa};
  const auto shared = std::make_shared<SharedStep>(
      params, step, std::min<std::int64_t>(step.count, threads * ranges_per_thread));
  for (int i = 1; i < threads && schedule(frame, shared); ++i) {
  }
  shared->work();
  return shared->wait();
}

}  // namespace rmsnorm::python::xla
