#include <cstdint>
#include <cstring>
#include <rmsnorm/rmsnorm.hpp>
#include <vector>

#include <rmsnorm/rmsnorm.h>

using Forward = rmsnorm::Status (*)(const rmsnorm::ForwardParams&, std::int64_t, std::int64_t);

Forward forward_of_the_second_unit() { return rmsnorm::cpu::forward; }

float first_result_of_the_second_unit() {
  const float x[2] = {3, 4};
  float y[2] = {};
  rmsnorm::ForwardParams p;
  p.x = rmsnorm::vector(x, 2);
  p.y = rmsnorm::vector(y, 2);
  rmsnorm::cpu::forward(p, 0, 1);
  return y[0];
}

// The table of CPUs that halve 512 bits, which few machines have: here it is made on any that can
// run its kernels. Elements are bytes in some order, of which few are NaN in every dtype.
bool mixed_kernels_give_the_bits_of_scalar_code() {
#if defined(RMSNORM_X86_64)
  using namespace rmsnorm;
  if (!cpu::available(cpu::Isa::avx512)) return true;
  const bool native = cpu::available(cpu::Isa::avx512_bf16);
  const cpu::detail::KernelTable table = cpu::detail::avx2_but_for_bf16(
      native ? cpu::detail::avx512_bf16_kernels() : cpu::detail::avx512::kernel_table());
  constexpr std::int64_t rows = 9, n = 75;
  for (const DType t : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    const auto bytes = static_cast<std::size_t>(rows * n * size_in_bytes(t));
    std::vector<unsigned char> x(bytes), w(bytes / rows), expected(bytes), found(bytes);
    for (std::size_t i = 0; i < bytes; ++i) x[i] = static_cast<unsigned char>(i * i / 7 % 63);
    for (std::size_t i = 0; i < w.size(); ++i) w[i] = static_cast<unsigned char>(63 - i % 61);
    ForwardParams p;
    p.x = matrix(reinterpret_cast<const float*>(x.data()), rows, n);
    p.weight = vector(reinterpret_cast<const float*>(w.data()), n);
    p.y = matrix(reinterpret_cast<float*>(expected.data()), rows, n);
    p.x.dtype = p.weight.dtype = p.y.dtype = t;
    if (!cpu::forward(p, 0, rows, cpu::Isa::scalar).ok()) return false;
    p.y.data = found.data();
    cpu::detail::RowLayout layout;
    if (!cpu::detail::check_and_lay_out(p, &layout).ok()) return false;
    cpu::detail::forward_rows(p, layout, 0, rows, table);
    if (std::memcmp(expected.data(), found.data(), bytes) != 0) return false;
  }
#endif
  return true;
}
