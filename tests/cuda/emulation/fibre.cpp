#include "fibre.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>

#if CUDA_EMULATION_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#if !CUDA_EMULATION_UCONTEXT
// Saves what the calling convention makes the callee's, except the floating-point control words:
// kernels do not change them, and a launch sets them for all its threads. A return instruction
// would be predicted to go back to the fibre that called.
extern "C" void cuda_emulation_switch(void** save_stack_pointer, void* stack_pointer);
__asm__(
    ".text\n"
    ".globl cuda_emulation_switch\n"
    ".hidden cuda_emulation_switch\n"
    ".type cuda_emulation_switch, @function\n"
    ".balign 16\n"
    "cuda_emulation_switch:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  popq %rcx\n"
    "  jmpq *%rcx\n"
    ".size cuda_emulation_switch, .-cuda_emulation_switch\n");
#endif

namespace cuda_emulation {
namespace {

// AddressSanitizer's redzones make frames several times as large.
constexpr std::size_t stack_bytes =
    CUDA_EMULATION_ASAN ? std::size_t{256} << 10 : std::size_t{64} << 10;

// The fibre that is about to run for the first time.
thread_local Fibre* entering = nullptr;

}  // namespace

Fibre::Fibre(void* stack, std::size_t bytes) {
#if CUDA_EMULATION_ASAN
  stack_ = stack;
  stack_bytes_ = bytes;
#endif
#if !CUDA_EMULATION_UCONTEXT
  // As if enter() had been called from address 0, which ends a debugger's backtrace: its return
  // address lies 8 bytes off a 16-byte boundary, and six registers wait to be popped before it.
  const std::uintptr_t top =
      (reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~std::uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(&Fibre::enter);
  stack_pointer_ = frame;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fibre::enter, 0);
#endif
}

void Fibre::start(Body body, void* argument) {
  body_ = body;
  argument_ = argument;
}

void Fibre::switch_in() {
#if !CUDA_EMULATION_UCONTEXT
  cuda_emulation_switch(&resumer_, stack_pointer_);
#else
  swapcontext(&resumer_, &context_);
#endif
}

void Fibre::switch_out() {
#if !CUDA_EMULATION_UCONTEXT
  cuda_emulation_switch(&stack_pointer_, resumer_);
#else
  swapcontext(&context_, &resumer_);
#endif
}

void Fibre::resume() {
  entering = this;
#if CUDA_EMULATION_ASAN
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, stack_, stack_bytes_);
  switch_in();
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#else
  switch_in();
#endif
}

void Fibre::suspend() {
#if CUDA_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&own_frames_, resumer_stack_, resumer_stack_bytes_);
  switch_out();
  // Another OS thread may have resumed it.
  __sanitizer_finish_switch_fiber(own_frames_, &resumer_stack_, &resumer_stack_bytes_);
#else
  switch_out();
#endif
}

void Fibre::enter() {
  Fibre* self = entering;
#if CUDA_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &self->resumer_stack_, &self->resumer_stack_bytes_);
#endif
  self->loop();
}

void Fibre::loop() {
  for (;;) {
    body_(argument_);
    suspend();
  }
}

Fibre& pooled_fibre(std::size_t i) {
  // Never destroyed: another static's destructor may launch.
  static std::deque<Fibre>& fibres = *new std::deque<Fibre>;
  while (fibres.size() <= i) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // The lowest page stays out of reach: a stack that grows into it faults.
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
      std::perror("cuda emulation: no memory for stacks");
      std::abort();
    }
    // Stacks whose tops lie a page apart would all use the same sets of the cache.
    const std::size_t colour = fibres.size() % 16 * 256;
    fibres.emplace_back(static_cast<char*>(memory) + page, stack_bytes - colour);
  }
  return fibres[i];
}

}  // namespace cuda_emulation
