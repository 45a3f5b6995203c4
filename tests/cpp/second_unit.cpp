#include <rmsnorm/rmsnorm.hpp>

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
