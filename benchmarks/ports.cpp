// What the execution units leave to the CPU kernels: cycles for eight of an instruction that do not
// wait for each other, in 256 bits and, where the CPU has them, in 512. Cycles are those of
// dependent additions of integers, of which every CPU does one a cycle.
//
//   cmake -B build -DRMSNORM_BENCHMARKS=ON && cmake --build build && build/benchmarks/ports
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <rmsnorm/rmsnorm.hpp>

namespace {

alignas(64) float memory[1024];

constexpr int rounds = 7;
constexpr long repetitions = 200000;

// The shortest of several measurements, in seconds for one of the repetitions that body() makes.
template <class Body>
double seconds_of(Body body) {
  double shortest = 1;
  for (int round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    shortest = std::min(shortest, time.count() / static_cast<double>(repetitions));
  }
  return shortest;
}

// Registers 8 and 9 hold ones and a half, since quotients and roots of zeros may be faster.
#define REPEAT(text)                                                                             \
  const double value = 1.5;                                                                      \
  long count = repetitions;                                                                      \
  __asm__ volatile(                                                                              \
      "vbroadcastsd %2, %%ymm8\n\tvbroadcastsd %2, %%ymm9\n"                                     \
      "1:\n\t" text "dec %0\n\tjnz 1b\n\tvzeroupper"                                             \
      : "+r"(count)                                                                              \
      : "r"(memory), "m"(value)                                                                  \
      : "memory", "rax", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
        "xmm9", "xmm15")

double cycle() {
  return seconds_of([] {
           REPEAT(
               "add $1, %%rax\n\tadd $1, %%rax\n\tadd $1, %%rax\n\tadd $1, %%rax\n\t"
               "add $1, %%rax\n\tadd $1, %%rax\n\tadd $1, %%rax\n\tadd $1, %%rax\n\t");
         }) /
         8;
}

// `one` is the text of an instruction with the number of its target register.
#define EIGHT(one) one("0") one("1") one("2") one("3") one("4") one("5") one("6") one("7")
#define PORT(name, one) \
  std::printf("%-44s %6.2f\n", name, seconds_of([] { REPEAT(EIGHT(one)); }) / one_cycle)

#define CONVERT_AND_ADD_256(i) \
  "vcvtps2pd (%1), %%ymm15\n\tvfmadd231pd %%ymm15, %%ymm15, %%ymm" i "\n\t"
#define CONVERT_AND_ADD_512(i) \
  "vcvtps2pd (%1), %%zmm15\n\tvfmadd231pd %%zmm15, %%zmm15, %%zmm" i "\n\t"
#define MULTIPLY_256(i) "vmulps %%ymm8, %%ymm8, %%ymm" i "\n\t"
#define MULTIPLY_512(i) "vmulps %%zmm8, %%zmm8, %%zmm" i "\n\t"
#define LOAD_256(i) "vmovups (%1), %%ymm" i "\n\t"
#define LOAD_512(i) "vmovups (%1), %%zmm" i "\n\t"
#define STORE_256(i) "vmovups %%ymm" i ", 64*" i "(%1)\n\t"
#define STORE_512(i) "vmovups %%zmm" i ", 64*" i "(%1)\n\t"
#define TO_F16_256(i) "vcvtps2ph $0, %%ymm8, %%xmm" i "\n\t"
#define TO_F16_512(i) "vcvtps2ph $0, %%zmm8, %%ymm" i "\n\t"
#define FROM_F16_256(i) "vcvtph2ps (%1), %%ymm" i "\n\t"
#define FROM_F16_512(i) "vcvtph2ps (%1), %%zmm" i "\n\t"
#define TO_BF16_512(i) "vcvtne2ps2bf16 %%zmm8, %%zmm9, %%zmm" i "\n\t"
#define DIVIDE_ONE(i) "vdivsd %%xmm8, %%xmm9, %%xmm" i "\n\t"
#define DIVIDE_256(i) "vdivpd %%ymm8, %%ymm9, %%ymm" i "\n\t"
#define ROOT_ONE(i) "vsqrtsd %%xmm8, %%xmm8, %%xmm" i "\n\t"
#define ROOT_256(i) "vsqrtpd %%ymm8, %%ymm" i "\n\t"

void ports_of_256_bits(double one_cycle) {
  PORT("f32 from memory to f64, fma: 4 elements", CONVERT_AND_ADD_256);
  PORT("product of f32: 8 elements", MULTIPLY_256);
  PORT("load: 32 bytes", LOAD_256);
  PORT("store: 32 bytes", STORE_256);
  PORT("f32 to f16: 8 elements", TO_F16_256);
  PORT("f16 from memory to f32: 8 elements", FROM_F16_256);
  PORT("quotient of f64: 1 element", DIVIDE_ONE);
  PORT("quotient of f64: 4 elements", DIVIDE_256);
  PORT("root of f64: 1 element", ROOT_ONE);
  PORT("root of f64: 4 elements", ROOT_256);
}

void ports_of_512_bits(double one_cycle) {
  PORT("f32 from memory to f64, fma: 8 elements", CONVERT_AND_ADD_512);
  PORT("product of f32: 16 elements", MULTIPLY_512);
  PORT("load: 64 bytes", LOAD_512);
  PORT("store: 64 bytes", STORE_512);
  PORT("f32 to f16: 16 elements", TO_F16_512);
  PORT("f16 from memory to f32: 16 elements", FROM_F16_512);
}

}  // namespace

int main() {
  using rmsnorm::cpu::available;
  using rmsnorm::cpu::Isa;
  if (!available(Isa::avx2)) {
    std::puts("this CPU has no AVX2");
    return 1;
  }
  for (float& element : memory) element = 1.5f;
  const double one_cycle = cycle();
  std::printf("a cycle takes %.3f ns; cycles for eight:\n", one_cycle * 1e9);
  ports_of_256_bits(one_cycle);
  if (available(Isa::avx512)) ports_of_512_bits(one_cycle);
  if (available(Isa::avx512_bf16)) PORT("f32 to bf16: 32 elements", TO_BF16_512);
  return 0;
}
