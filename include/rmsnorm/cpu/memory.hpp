// What moves memory besides loads and stores: prefetches, the order of stores past the caches, and
// what decides where to use them: the sizes of caches, and whether memory is new.
#pragma once

#include <cstdint>

#include "isa.hpp"

#if defined(RMSNORM_X86_64)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rmsnorm {
namespace cpu {
namespace detail {

#if defined(RMSNORM_X86_64)

// The line at any address to the nearest cache, to be read or to be written. PREFETCHW does nothing
// on CPUs without it. As assembly, since gcc takes a function that only prefetches to have no
// effect and drops its calls.
#if defined(__GNUC__)
inline void prefetch(const char* p) { __asm__ volatile("prefetcht0 %0" : : "m"(*p)); }
inline void prefetch_to_write(const char* p) { __asm__ volatile("prefetchw %0" : : "m"(*p)); }
#else
inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }
inline void prefetch_to_write(const char* p) { _m_prefetchw(p); }
#endif

// Whether the CPU fetches well by itself what is needed soon. On Zen 5 each instruction that is
// spared lets it look further ahead: f32 4096 x 128, cold, took 1.25 times as long with prefetches.
// On an Intel Xeon they took 16384 x 128 from 1.25 copies to 1.03.
inline bool fetches_well() {
  static const bool well = is_amd();
  return well;
}

struct CacheBytes {
  std::int64_t second_level = 0;  // 0: CPUID does not tell
  std::int64_t last_level = 0;
};

// Leaf 4 (Intel) and 0x8000001d (AMD) describe one cache each in the same way: its size is
// ways * partitions * line * sets.
inline CacheBytes read_cache_bytes() {
  CacheBytes found;
  for (const std::uint32_t leaf : {0x8000001du, 4u}) {
    if (cpuid(leaf & 0x80000000u).a < leaf) continue;
    for (std::uint32_t index = 0; index < 8; ++index) {
      const CpuidRegisters r = cpuid(leaf, index);
      const std::uint32_t type = r.a & 0x1fu, level = (r.a >> 5) & 0x7u;
      if (type == 0) break;
      const std::int64_t ways = (r.b >> 22) + 1, partitions = ((r.b >> 12) & 0x3ffu) + 1;
      const std::int64_t line = (r.b & 0xfffu) + 1, sets = std::int64_t{r.c} + 1;
      const std::int64_t bytes = ways * partitions * line * sets;
      if (level == 2) found.second_level = bytes;
      if (bytes > found.last_level) found.last_level = bytes;
    }
  }
  return found;
}

inline const CacheBytes& cache_bytes() {
  static const CacheBytes bytes = read_cache_bytes();
  return bytes;
}

// What is as large as this lies in the third level or beyond: the second level, or what most CPUs
// have of it at least.
inline std::int64_t far_bytes() {
  const std::int64_t bytes = cache_bytes().second_level;
  return bytes > 0 ? bytes : std::int64_t{1} << 20;
}

// Inputs and outputs of this many bytes are not found in the cache by whoever reads the outputs
// next. A store past the caches then saves reading the line that it overwrites.
//
// On AMD CPUs, which tell the L3 that a core shares, that is as much as it holds. Zen 5, L3 of
// 32 MiB, f32, the time of the norm and of reading y afterwards with such stores over that without,
// warm and cold: rows of 128 elements 1.63 and 1.06 for 16 MiB, 1.32 and 1.02 for 24, 1.11 and 0.96
// for 32; of 4096 elements 1.35 and 1.00, 1.14 and 0.97, 1.00 and 0.98. The norm alone gains where
// its reader loses more: 16 MiB of rows of 128 elements take 1.16 warm and 0.96 cold, 24 MiB 0.96
// and 0.88.
//
// On an Intel Xeon, over a copy, f32 rows of 4096: 0.83 against 1.46 for 128 MiB, 0.84 against 1.14
// for 64 MiB, 0.91 against 0.87 for 32 MiB, where the cache is larger than that; half of a cache of
// 32 MiB is enough where it ends there. Virtual machines name the caches of the whole host, hence
// the upper limit, and some name no cache of the last level, hence the lower one.
inline std::int64_t streaming_bytes() {
  static const std::int64_t bytes = [] {
    constexpr std::int64_t least = std::int64_t{8} << 20, most = std::int64_t{48} << 20;
    const std::int64_t last = cache_bytes().last_level;
    const std::int64_t enough = is_amd() ? last : last / 2;
    return enough < 1 || enough > most ? most : enough < least ? least : enough;
  }();
  return bytes;
}

// Whether the page at p is there, which new memory gets when it is first written: zeroed, and by
// that in the cache, from which a store past the caches has to throw it out first. f32 4096 x 4096
// takes 53 ms with such stores to new memory and 35 with others.
inline bool is_backed(const void* p) {
#if defined(__linux__)
  constexpr std::uintptr_t page = 4096;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(p) / page * page;
  unsigned char resident = 1;
  return mincore(reinterpret_cast<void*>(begin), page, &resident) != 0 || (resident & 1) != 0;
#else
  return p != nullptr;
#endif
}

// Orders streamed stores before whatever the thread stores next, as other threads see them.
inline void finish_streams() { _mm_sfence(); }

#else

inline void prefetch(const char*) {}
inline void prefetch_to_write(const char*) {}
inline bool fetches_well() { return false; }
inline std::int64_t far_bytes() { return std::int64_t{1} << 20; }
inline std::int64_t streaming_bytes() { return INT64_MAX; }
inline bool is_backed(const void*) { return true; }
inline void finish_streams() {}

#endif

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
