// Two translation units that include every header: whatever is not inline is defined twice, and
// inline functions must be the same function in both.
#include <rmsnorm/rmsnorm.h>

#include <rmsnorm/rmsnorm.hpp>

using Forward = rmsnorm::Status (*)(const rmsnorm::ForwardParams&, std::int64_t, std::int64_t);

Forward forward_of_the_second_unit();
float first_result_of_the_second_unit();
bool mixed_kernels_give_the_bits_of_scalar_code();

int main() {
  const float x[2] = {3, 4};
  float y[2] = {};
  rmsnorm::ForwardParams p;
  p.x = rmsnorm::vector(x, 2);
  p.y = rmsnorm::vector(y, 2);
  const Forward forward = rmsnorm::cpu::forward;
  if (forward != forward_of_the_second_unit()) return 1;
  if (!forward(p, 0, 1).ok()) return 2;
  if (!mixed_kernels_give_the_bits_of_scalar_code()) return 4;
  return y[0] == first_result_of_the_second_unit() ? 0 : 3;
}
