// A function with a stack of its own that can be left and entered again.
#pragma once

#include <cstddef>

// Switching by ucontext, which every CPU has, costs two system calls.
#if !defined(CUDA_EMULATION_UCONTEXT)
#if defined(__x86_64__)
#define CUDA_EMULATION_UCONTEXT 0
#else
#define CUDA_EMULATION_UCONTEXT 1
#endif
#endif

#if CUDA_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_EMULATION_ASAN 1
#endif
#endif
#if !defined(CUDA_EMULATION_ASAN)
#define CUDA_EMULATION_ASAN 0
#endif

namespace cuda_emulation {

class Fibre {
 public:
  using Body = void (*)(void* argument);

  Fibre(void* stack, std::size_t bytes);
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // The next resume() calls the body. A fibre may start again when its body has returned.
  void start(Body body, void* argument);

  // Runs the fibre until it suspends itself or its body returns.
  void resume();

  // Back to where resume() was called.
  void suspend();

 private:
  static void enter();
  [[noreturn]] void loop();
  void switch_in();
  void switch_out();

#if CUDA_EMULATION_UCONTEXT
  ucontext_t context_;
  ucontext_t resumer_;
#else
  void* stack_pointer_ = nullptr;
  void* resumer_ = nullptr;
#endif
  Body body_ = nullptr;
  void* argument_ = nullptr;
#if CUDA_EMULATION_ASAN
  const void* stack_;
  std::size_t stack_bytes_;
  void* own_frames_ = nullptr;
  const void* resumer_stack_ = nullptr;
  std::size_t resumer_stack_bytes_ = 0;
#endif
};

// The i-th of the fibres that all launches share, one launch at a time.
Fibre& pooled_fibre(std::size_t i);

}  // namespace cuda_emulation
