#include <cmath>
#include <rmsnorm/rmsnorm.hpp>

rmsnorm::Status normalise_with_headers(const float* x, float* y, std::int64_t rows, std::int64_t n);

int main() {
  const float x[4] = {3, -4, 5, 12};
  float y[4], z[4];
  if (!normalise_with_headers(x, y, 2, 2).ok()) return 1;
  rmsnorm::ForwardParams p;
  p.x = rmsnorm::matrix(x, 2, 2);
  p.y = rmsnorm::matrix(z, 2, 2);
  if (!rmsnorm::cpu::forward(p, 0, 2).ok()) return 2;
  for (int i = 0; i < 4; ++i) {
    if (y[i] != z[i]) return 3;
  }
  return std::fabs(y[0] - 3 / std::sqrt(12.5)) < 1e-5 ? 0 : 4;
}
