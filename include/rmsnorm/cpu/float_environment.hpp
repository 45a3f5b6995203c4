// Results must not depend on the floating-point mode of the calling thread: a library built with
// -ffast-math somewhere in the process turns denormals off for every thread, and frameworks offer
// it as an option.
#pragma once

#include <cstdint>

#include "isa.hpp"

#if defined(RMSNORM_X86_64)
#include <immintrin.h>
#endif

namespace rmsnorm {
namespace cpu {
namespace detail {

#if defined(RMSNORM_X86_64)

class FloatEnvironment {
 public:
  FloatEnvironment() : saved_(_mm_getcsr()) {
    if ((saved_ & control_bits) != default_mode) _mm_setcsr(default_mode);
  }
  ~FloatEnvironment() {
    if ((saved_ & control_bits) != default_mode) _mm_setcsr(saved_);
  }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  // Nearest even, no flush-to-zero, no denormals-are-zero, all exceptions masked; bits 0-5 are
  // flags.
  static constexpr unsigned default_mode = 0x1f80;
  static constexpr unsigned control_bits = 0xffc0;
  unsigned saved_;
};

#elif defined(RMSNORM_AARCH64) && !defined(_MSC_VER)

class FloatEnvironment {
 public:
  FloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    if (saved_ != 0) write(0);
  }
  ~FloatEnvironment() {
    if (saved_ != 0) write(saved_);
  }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  static void write(std::uint64_t mode) {
    __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
  }
  std::uint64_t saved_;
};

#else

// The compiler offers no way to the mode here: the caller's thread must be in the default one.
class FloatEnvironment {
 public:
  FloatEnvironment() {}
  ~FloatEnvironment() {}
};

#endif

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
