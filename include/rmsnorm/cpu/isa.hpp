// Which instruction sets this build has kernels for, and which of them this CPU can run.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>

#if defined(__x86_64__) || defined(_M_X64)
#define RMSNORM_X86_64 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
// Compilers that know the instructions of AVX512_BF16.
#if defined(__clang__) ? __clang_major__ >= 9 \
: defined(__GNUC__)    ? __GNUC__ >= 10       \
                       : defined(_MSC_VER) && _MSC_VER >= 1927
#define RMSNORM_HAS_AVX512_BF16 1
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define RMSNORM_AARCH64 1
#endif

namespace rmsnorm {
namespace cpu {

enum class Isa : std::int32_t {
  scalar = 0,  // portable C++, the reference
  avx2 = 1,    // AVX2 + FMA + F16C
  avx512 = 2,  // AVX-512 F, BW, DQ, VL on top
  neon = 3,    // every aarch64 CPU
  // What avx512 is, and AVX512_BF16, by which f32 is rounded to bf16.
  avx512_bf16 = 4,
};

// From the narrowest to the widest.
constexpr Isa every_isa[] = {Isa::scalar, Isa::neon, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

constexpr const char* name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::neon: return "neon";
    case Isa::avx512_bf16: return "avx512_bf16";
  }
  return "unknown";
}

namespace detail {

// ASCII alone, whatever the locale.
constexpr char lower_case(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }

inline bool equals_in_any_case(const char* text, const char* lower) {
  while (*text != '\0' && lower_case(*text) == *lower) ++text, ++lower;
  return *text == *lower;
}

}  // namespace detail

// Finds an ISA by its name, in any case: "avx2", "AVX2". False where no ISA has that name; `isa` is
// left alone then.
inline bool find_isa(const char* text, Isa* isa) {
  for (const Isa each : every_isa) {
    if (!detail::equals_in_any_case(text, name(each))) continue;
    *isa = each;
    return true;
  }
  return false;
}

namespace detail {

#if defined(RMSNORM_X86_64)

struct CpuidRegisters {
  std::uint32_t a, b, c, d;
};

inline CpuidRegisters cpuid(std::uint32_t leaf, std::uint32_t index = 0) {
  CpuidRegisters r = {0, 0, 0, 0};
#if defined(_MSC_VER)
  int regs[4];
  __cpuidex(regs, static_cast<int>(leaf), static_cast<int>(index));
  r = {static_cast<std::uint32_t>(regs[0]), static_cast<std::uint32_t>(regs[1]),
       static_cast<std::uint32_t>(regs[2]), static_cast<std::uint32_t>(regs[3])};
#else
  __cpuid_count(leaf, index, r.a, r.b, r.c, r.d);
#endif
  return r;
}

inline bool is_amd() {
  const CpuidRegisters vendor = cpuid(0);
  return vendor.b == 0x68747541u && vendor.d == 0x69746e65u && vendor.c == 0x444d4163u;
}

// Whether operations on 512 bits take their unit for two cycles, as in Zen 4 and the Zen 5 of
// notebooks: leaf 0x8000001a of AMD tells the width of the data path, 256 bits in bit 2. Bit 3
// tells 512, but hypervisors hide it: the Zen 5 of servers has neither there.
inline bool halves_512_bits() {
  if (!is_amd() || cpuid(0x80000000u).a < 0x8000001au) return false;
  return (cpuid(0x8000001au).a & 0xcu) == 4u;
}

// Register state that the operating system saves; only to be asked when CPUID reports OSXSAVE.
inline std::uint64_t enabled_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

inline bool has_all(std::uint32_t word, std::uint32_t bits) { return (word & bits) == bits; }

struct X86Features {
  bool avx2 = false;
  bool avx512 = false;
  bool avx512_bf16 = false;
};

inline X86Features detect_x86() {
  X86Features found;
  if (cpuid(0).a < 7) return found;
  const CpuidRegisters basic = cpuid(1);
  constexpr std::uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  if (!has_all(basic.c, fma | osxsave | avx | f16c)) return found;
  const CpuidRegisters extended = cpuid(7);
  const std::uint64_t state = enabled_state();
  constexpr std::uint64_t ymm_state = 0x6, zmm_state = 0xe6;
  constexpr std::uint32_t avx2 = 1u << 5;
  constexpr std::uint32_t avx512_f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  found.avx2 = has_all(extended.b, avx2) && (state & ymm_state) == ymm_state;
  found.avx512 =
      found.avx2 && has_all(extended.b, avx512_f_dq_bw_vl) && (state & zmm_state) == zmm_state;
#if defined(RMSNORM_HAS_AVX512_BF16)
  constexpr std::uint32_t bf16 = 1u << 5;
  found.avx512_bf16 = found.avx512 && extended.a >= 1 && has_all(cpuid(7, 1).a, bf16);
#endif
  return found;
}

inline const X86Features& x86_features() {
  static const X86Features features = detect_x86();
  return features;
}

#endif

}  // namespace detail

// This build has kernels for the ISA and this CPU and operating system can run them.
inline bool available(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
#if defined(RMSNORM_X86_64)
    case Isa::avx2: return detail::x86_features().avx2;
    case Isa::avx512: return detail::x86_features().avx512;
    case Isa::avx512_bf16: return detail::x86_features().avx512_bf16;
#elif defined(RMSNORM_AARCH64)
    case Isa::neon: return true;
#endif
    default: return false;
  }
}

struct IsaChoice {
  Isa isa;
  bool ok;  // false: RMSNORM_ISA is no name of an ISA, or that of one that is not available
  // Nobody asked for this ISA: kernels of narrower ones are taken where they are faster.
  bool automatic = false;
};

namespace detail {

inline IsaChoice choose_isa() {
  const char* wanted = std::getenv("RMSNORM_ISA");
  if (wanted != nullptr && wanted[0] != '\0') {
    Isa isa = Isa::scalar;
    const bool ok = find_isa(wanted, &isa) && available(isa);
    return {ok ? isa : Isa::scalar, ok};
  }
  Isa widest = Isa::scalar;
  for (const Isa isa : every_isa) {
    if (available(isa)) widest = isa;
  }
  return {widest, true, true};
}

}  // namespace detail

// The ISA that calls without an explicit one use: the environment variable RMSNORM_ISA (a name that
// find_isa knows), else the widest one available. The first choice that is one stays; where
// RMSNORM_ISA names none that can run here it is read again at the next call.
inline IsaChoice active_isa() {
  constexpr int automatic = 256;
  static std::atomic<int> chosen{-1};
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    const IsaChoice choice = detail::choose_isa();
    if (!choice.ok) return choice;
    // Of two threads the first one has chosen for both.
    const int own = static_cast<int>(choice.isa) | (choice.automatic ? automatic : 0);
    if (chosen.compare_exchange_strong(isa, own)) return choice;
  }
  return {static_cast<Isa>(isa & ~automatic), true, (isa & automatic) != 0};
}

}  // namespace cpu
}  // namespace rmsnorm
