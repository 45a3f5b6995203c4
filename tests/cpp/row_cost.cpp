// One forward and one backward pass of AVX2 on one thread, whose instructions row_cost.cmake
// counts:
//
//   rmsnorm_row_cost f16|bf16|f32|f64 ROWS N
//
// as autograd calls them: the weight of x's dtype, forward's rstd given to backward, dx and
// dweight. Exits with 77 where the CPU has no AVX2.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <rmsnorm/convert.hpp>
#include <rmsnorm/rmsnorm.hpp>
#include <string>
#include <type_traits>
#include <vector>

constexpr rmsnorm::cpu::Isa avx2 = rmsnorm::cpu::Isa::avx2;

// By these names valgrind finds what to count in.
extern "C" {
__attribute__((noinline)) bool counted_forward(const rmsnorm::ForwardParams& p, std::int64_t rows) {
  return rmsnorm::cpu::forward(p, 0, rows, avx2).ok();
}
__attribute__((noinline)) bool counted_backward(const rmsnorm::BackwardParams& p, void* workspace) {
  rmsnorm::cpu::BackwardPass pass(p);
  return pass.set_workspace(workspace, pass.workspace_bytes()).ok() &&
         pass.run(0, pass.blocks(), avx2).ok() && pass.reduce(0, pass.columns(), avx2).ok();
}
}

namespace {

template <class T>
std::vector<T> some_elements(std::int64_t count) {
  std::vector<T> v(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < v.size(); ++i) {
    v[i] = rmsnorm::detail::narrow<T>::from(static_cast<float>(i * 37 % 101) / 50 - 1);
  }
  return v;
}

template <class T>
bool run(std::int64_t rows, std::int64_t n) {
  using Statistic = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const std::vector<T> x = some_elements<T>(rows * n), dy = x, weight = some_elements<T>(n);
  std::vector<T> y(x.size()), dx(x.size()), dweight(weight.size());
  std::vector<Statistic> rstd(static_cast<std::size_t>(rows));

  rmsnorm::ForwardParams forward;
  forward.x = rmsnorm::matrix(x.data(), rows, n);
  forward.weight = rmsnorm::vector(weight.data(), n);
  forward.y = rmsnorm::matrix(y.data(), rows, n);
  forward.rstd = rmsnorm::vector(rstd.data(), rows);
  // The first call of a process asks CPUID and is not what calls take.
  if (!rmsnorm::cpu::forward(forward, 0, rows, avx2).ok()) return false;
  if (!counted_forward(forward, rows)) return false;

  rmsnorm::BackwardParams backward;
  backward.dy = rmsnorm::matrix(dy.data(), rows, n);
  backward.x = forward.x;
  backward.weight = forward.weight;
  backward.rstd = forward.rstd;
  backward.dx = rmsnorm::matrix(dx.data(), rows, n);
  backward.dweight = rmsnorm::vector(dweight.data(), n);
  const auto bytes = static_cast<std::size_t>(rmsnorm::cpu::backward_workspace(backward));
  void* const workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  const bool ok = counted_backward(backward, workspace);
  std::free(workspace);
  return ok;
}

bool run(const std::string& dtype, std::int64_t rows, std::int64_t n) {
  if (dtype == "f16") return run<rmsnorm::float16>(rows, n);
  if (dtype == "bf16") return run<rmsnorm::bfloat16>(rows, n);
  if (dtype == "f32") return run<float>(rows, n);
  return dtype == "f64" && run<double>(rows, n);
}

}  // namespace

int main(int argc, char** argv) {
  if (!rmsnorm::cpu::available(avx2)) return 77;
  if (argc == 4 && run(argv[1], std::atoll(argv[2]), std::atoll(argv[3]))) return 0;
  std::fprintf(stderr, "usage: rmsnorm_row_cost f16|bf16|f32|f64 ROWS N\n");
  return 2;
}
