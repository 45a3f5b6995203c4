// What the memory system leaves to an RMSNorm of two passes: the parts of the plainest AVX2 code,
// each measured apart and interleaved, over a copy of the same bytes. Then the backward pass, over
// one that only reads dy and x and writes dx.
//
//   cmake -B build -DRMSNORM_BENCHMARKS=ON && cmake --build build && build/benchmarks/limits [rows]
//   [n]
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <rmsnorm/rmsnorm.hpp>
#include <string>
#include <vector>

namespace {

#define LIMITS_AVX2 __attribute__((target("avx2,fma"), noinline))

// Sinks keep the compiler from dropping a pass; every n here is a multiple of 32.
LIMITS_AVX2 double sum_in_float_lanes(const float* x, std::int64_t n) {
  __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
  for (std::int64_t i = 0; i < n; i += 32) {
    const __m256 p = _mm256_loadu_ps(x + i), q = _mm256_loadu_ps(x + i + 8);
    const __m256 r = _mm256_loadu_ps(x + i + 16), s = _mm256_loadu_ps(x + i + 24);
    a = _mm256_fmadd_ps(p, p, a);
    b = _mm256_fmadd_ps(q, q, b);
    c = _mm256_fmadd_ps(r, r, c);
    d = _mm256_fmadd_ps(s, s, d);
  }
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
  double sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

LIMITS_AVX2 double sum_in_double_lanes(const float* x, std::int64_t n) {
  __m256d acc[8];
#pragma GCC unroll 8
  for (int u = 0; u < 8; ++u) acc[u] = _mm256_setzero_pd();
  for (std::int64_t i = 0; i < n; i += 32) {
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
      const __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * u));
      acc[u] = _mm256_fmadd_pd(v, v, acc[u]);
    }
  }
#pragma GCC unroll 8
  for (int u = 1; u < 8; ++u) acc[0] = _mm256_add_pd(acc[0], acc[u]);
  double lanes[4];
  _mm256_storeu_pd(lanes, acc[0]);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

template <bool weighted>
LIMITS_AVX2 void scale(const float* x, const float* w, float* y, std::int64_t n, float factor) {
  const __m256 r = _mm256_set1_ps(factor);
  for (std::int64_t i = 0; i < n; i += 32) {
#pragma GCC unroll 4
    for (int u = 0; u < 32; u += 8) {
      __m256 h = _mm256_mul_ps(r, _mm256_loadu_ps(x + i + u));
      if (weighted) h = _mm256_mul_ps(h, _mm256_loadu_ps(w + i + u));
      _mm256_storeu_ps(y + i + u, h);
    }
  }
}

LIMITS_AVX2 void read_two_write_one(const float* a, const float* b, float* c, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 8) {
    _mm256_storeu_ps(c + i, _mm256_add_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i)));
  }
}

float* aligned_floats(std::int64_t count) {
  const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(float) + 4095) / 4096 * 4096;
  float* p = static_cast<float*>(std::aligned_alloc(4096, bytes));
  for (std::int64_t i = 0; i < count; ++i) p[i] = static_cast<float>(i * 37 % 101) / 50 - 1;
  return p;
}

struct Part {
  std::string name;
  std::function<void()> run;
  std::vector<double> seconds = {};
};

// Interleaved; medians, over that of the first.
void measure(std::vector<Part> parts, int rounds, const char* unit) {
  for (int round = 0; round < rounds; ++round) {
    for (Part& part : parts) {
      const auto start = std::chrono::steady_clock::now();
      part.run();
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
      part.seconds.push_back(time.count());
    }
  }
  double first = 0;
  for (Part& part : parts) {
    std::sort(part.seconds.begin(), part.seconds.end());
    const double median = part.seconds[part.seconds.size() / 2];
    if (first == 0) first = median;
    std::printf("%-34s %9.1f us  %5.2f %s\n", part.name.c_str(), median * 1e6, median / first,
                unit);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::int64_t rows = argc > 1 ? std::atoll(argv[1]) : 256;
  const std::int64_t n = argc > 2 ? std::atoll(argv[2]) : 4096;
  if (rows < 1 || n < 1024 || n % 1024 != 0 || !rmsnorm::cpu::available(rmsnorm::cpu::Isa::avx2)) {
    std::fprintf(stderr, "limits: rows >= 1, n a multiple of 1024, and a CPU with AVX2\n");
    return 2;
  }
  float* x = aligned_floats(rows * n);
  float* y = aligned_floats(rows * n);
  float* w = aligned_floats(n);
  static volatile double sink;

  const auto each_row = [=](auto body) {
    for (std::int64_t r = 0; r < rows; ++r) body(x + r * n, y + r * n);
  };
  const auto root = [=](double sum) {
    return static_cast<float>(1 / std::sqrt(sum / static_cast<double>(n) + 1e-6));
  };
  const auto forward = [=](std::int64_t shift) {
    rmsnorm::ForwardParams p;
    p.x = rmsnorm::matrix(static_cast<const float*>(x) + shift, rows - 1, n);
    p.weight = rmsnorm::vector(static_cast<const float*>(w), n);
    p.y = rmsnorm::matrix(y + shift, rows - 1, n);
    if (!rmsnorm::cpu::forward(p, 0, rows - 1).ok()) std::abort();
  };

  std::vector<Part> parts = {
      {"copy", [=] { std::memcpy(y, x, static_cast<std::size_t>(rows * n) * sizeof(float)); }},
      {"sum in float lanes",
       [=] { each_row([=](float* a, float*) { sink = sum_in_float_lanes(a, n); }); }},
      {"sum in double lanes",
       [=] { each_row([=](float* a, float*) { sink = sum_in_double_lanes(a, n); }); }},
      {"write y", [=] { each_row([=](float*, float* b) { scale<false>(w, w, b, n, 2.f); }); }},
      {"float sum, scale",
       [=] {
         each_row([=](float* a, float* b) {
           scale<false>(a, w, b, n, static_cast<float>(sum_in_float_lanes(a, n)));
         });
       }},
      {"float sum, scale, weight of 1024",
       [=] {
         each_row([=](float* a, float* b) {
           const float factor = static_cast<float>(sum_in_float_lanes(a, n));
           for (std::int64_t i = 0; i < n; i += 1024) scale<true>(a + i, w, b + i, 1024, factor);
         });
       }},
      {"float sum, scale, weight",
       [=] {
         each_row([=](float* a, float* b) {
           scale<true>(a, w, b, n, static_cast<float>(sum_in_float_lanes(a, n)));
         });
       }},
      {"float sum, root, scale, weight",
       [=] {
         each_row(
             [=](float* a, float* b) { scale<true>(a, w, b, n, root(sum_in_float_lanes(a, n))); });
       }},
      {"double sum, root, scale, weight",
       [=] {
         each_row(
             [=](float* a, float* b) { scale<true>(a, w, b, n, root(sum_in_double_lanes(a, n))); });
       }},
      {"rmsnorm", [=] { forward(0); }},
      {"rmsnorm, 16 bytes into a line", [=] { forward(4); }},
  };
  const int rounds = rows * n > (std::int64_t{1} << 22) ? 31 : 301;
  std::printf("%lld x %lld, ISA %s\n", static_cast<long long>(rows), static_cast<long long>(n),
              rmsnorm::cpu::name(rmsnorm::cpu::active_isa().isa));
  measure(parts, rounds, "copies");

  // Outputs of their own: a line that another part has left in the cache costs what it does not.
  float* dy = aligned_floats(rows * n);
  float* dx = aligned_floats(rows * n);
  float* dx_alone = aligned_floats(rows * n);
  float* dweight = aligned_floats(n);
  float* rstd = aligned_floats(rows);
  std::fill(rstd, rstd + rows, 1.5f);
  rmsnorm::BackwardParams p;
  p.dy = rmsnorm::matrix(static_cast<const float*>(dy), rows, n);
  p.x = rmsnorm::matrix(static_cast<const float*>(x), rows, n);
  p.rstd = rmsnorm::vector(static_cast<const float*>(rstd), rows);
  p.weight = rmsnorm::vector(static_cast<const float*>(w), n);
  p.dx = rmsnorm::matrix(dx_alone, rows, n);
  const auto backward = [n](const rmsnorm::BackwardParams& q) {
    const std::int64_t blocks = rmsnorm::cpu::backward_blocks(q);
    if (!rmsnorm::cpu::backward(q, 0, blocks).ok()) std::abort();
    if (!rmsnorm::cpu::backward_reduce(q, 0, n).ok()) std::abort();
  };
  rmsnorm::BackwardParams with_dweight = p;
  with_dweight.dx = rmsnorm::matrix(dx, rows, n);
  with_dweight.dweight = rmsnorm::vector(dweight, n);
  with_dweight.workspace_bytes = rmsnorm::cpu::backward_workspace(with_dweight);
  float* workspace = aligned_floats(with_dweight.workspace_bytes / 4);
  with_dweight.workspace = workspace;
  measure({{"read dy and x, write dx", [=] { read_two_write_one(dy, x, y, rows * n); }},
           {"rmsnorm, dx", [=] { backward(p); }},
           {"rmsnorm, dx and dweight", [=] { backward(with_dweight); }}},
          rounds, "such passes");
  for (float* memory : {dy, dx, dx_alone, dweight, rstd, workspace}) std::free(memory);
  std::free(x);
  std::free(y);
  std::free(w);
  return 0;
}
